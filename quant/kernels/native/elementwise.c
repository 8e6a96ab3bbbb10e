/* Norm, activation and rotary angles of a layer, each in one pass.

   A step with one token does little here, but torch takes a dozen operations for it, and each of them
   starts with cold caches: the weights have just gone through. Rounding is that of the operations of
   torch that they stand for, so that a model's logits are transformers'. */

#include "vector_types.h"

#define SET portable
#include "elementwise.h"
#ifdef __x86_64__
#define SET avx2
#include "elementwise.h"
#define CHOOSE(set, name) ((set) > 0 ? name##_avx2 : name##_portable)
#else
#define CHOOSE(set, name) name##_portable
#endif
#define SMALL 32768 /* elements that are not worth a second thread */

/* out = weight * (x / sqrt(mean(x^2) + eps)) for each row, after x += delta where delta is not NULL.
   All [T, D], contiguous, of `type`; weight [D]; D a multiple of 8. */
void shardrun_rms_norm(
    int set, void *x, const void *delta, const void *weight, int type, int64_t T, int64_t D, float eps,
    void *out) {
    (void)set;
#pragma omp parallel for schedule(static) if (T * D > SMALL)
    for (int64_t t = 0; t < T; t++)
        CHOOSE(set, norm_row)(x, delta, weight, type, t * D, D, eps, out);
}

/* out[t] = silu(gate_up[t, :F]) * gate_up[t, F:2F]; rows of gate_up are 2F apart. F a multiple of 8. */
void shardrun_silu_product(int set, const void *gate_up, int type, int64_t T, int64_t F, void *out) {
    (void)set;
#pragma omp parallel for schedule(static) if (T * F > SMALL)
    for (int64_t t = 0; t < T; t++)
        CHOOSE(set, silu_row)(gate_up, type, 2 * F * t, 2 * F * t + F, F, out, F * t);
}

/* Turns the first H heads of each row of x by the row's angles, in place. x: [T, >= H * C], rows
   `stride` elements apart; cos, sin: [T, C], the first half of the sines negative. C a multiple of 16. */
void shardrun_rotate(
    int set, void *x, int type, int64_t stride, int64_t T, int64_t H, int64_t C, const void *cos,
    const void *sin) {
    (void)set;
#pragma omp parallel for schedule(static) if (T * H * C > SMALL)
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < H; h++)
            CHOOSE(set, rotate_head)(x, type, t * stride + h * C, C, cos, sin, t * C);
}
