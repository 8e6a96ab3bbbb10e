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
#endif

typedef struct {
    int64_t set;
    void *x;
    const void *delta, *weight;
    int64_t type, T, D;
    double eps;
    void *out;
} rms_norm_t;

/* out = weight * (x / sqrt(mean(x^2) + eps)) for each row, after x += delta where delta is not NULL.
   All [T, D], contiguous, of `type`; weight [D]; D a multiple of 8. */
int shardrun_rms_norm(const rms_norm_t *a) {
#pragma omp parallel for schedule(static) if (a->T > 1 && a->T * a->D > SMALL)
    for (int64_t t = 0; t < a->T; t++)
        CHOOSE(a->set, norm_row)
            (a->x, a->delta, a->weight, a->type, t * a->D, a->D, (float)a->eps, a->out);
    return 0;
}

typedef struct {
    int64_t set;
    void *x;
    int64_t type, stride, T, H, K, C;
    const void *q_weight, *k_weight;
    double eps;
} norm_heads_t;

/* x = weight * (x / rms(x)) of each head by itself, in place: the first H heads of each row with
   q_weight, the K after them with k_weight. x: [T, >= (H + K) * C], rows `stride` elements apart; the
   weights: [C]. C a multiple of 8. */
int shardrun_norm_heads(const norm_heads_t *a) {
    int64_t num_heads = a->H + a->K;
#pragma omp parallel for schedule(static) if (a->T > 1 && a->T * num_heads * a->C > SMALL)
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t h = 0; h < num_heads; h++)
            CHOOSE(a->set, norm_row)
                (a->x, NULL, h < a->H ? a->q_weight : a->k_weight, a->type,
                 t * a->stride + h * a->C, a->C, (float)a->eps, a->x);
    return 0;
}

typedef struct {
    int64_t set;
    const void *gate_up;
    int64_t type, T, F;
    void *out;
} silu_product_t;

/* out[t] = silu(gate_up[t, :F]) * gate_up[t, F:2F]; rows of gate_up are 2F apart. F a multiple of 8. */
int shardrun_silu_product(const silu_product_t *a) {
    int64_t F = a->F, part = 1024, num_parts = (F + part - 1) / part;
#pragma omp parallel for schedule(static) collapse(2) if (a->T * F > SMALL)
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t p = 0; p < num_parts; p++) {
            int64_t gate = 2 * F * t + p * part, count = F - p * part < part ? F - p * part : part;
            CHOOSE(a->set, silu_row)
                (a->gate_up, a->type, gate, gate + F, count, a->out, F * t + p * part);
        }
    return 0;
}

typedef struct {
    int64_t set;
    void *x;
    int64_t type, stride, T, H, C;
    const void *cos, *sin;
    const int64_t *positions;
} rotate_t;

/* Turns the first H heads of each row of x by the angles of its position, in place.
   x: [T, >= H * C], rows `stride` elements apart; cos, sin: a row of C for each position, the first
   half of the sines negative. C a multiple of 16. */
int shardrun_rotate(const rotate_t *a) {
#pragma omp parallel for schedule(static) if (a->T > 1 && a->T * a->H * a->C > SMALL)
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t h = 0; h < a->H; h++)
            CHOOSE(a->set, rotate_head)
                (a->x, a->type, t * a->stride + h * a->C, a->C, a->cos, a->sin,
                 a->positions[t] * a->C);
    return 0;
}

typedef struct {
    const float *sums;
    const void *bias;
    int64_t bias_type, T, D;
    uint16_t *out;
} round_sums_t;

/* out = sums + bias, rounded to bfloat16. sums, out: [T, D]; bias: [D] of bias_type or NULL. */
int shardrun_round_sums(const round_sums_t *a) {
#pragma omp parallel for schedule(static) if (a->T > 1 && a->T * a->D > SMALL)
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t d = 0; d < a->D; d++) {
            float sum = a->sums[t * a->D + d];
            a->out[t * a->D + d] = to_bfloat16(a->bias ? sum + widen(a->bias, a->bias_type, d) : sum);
        }
    return 0;
}
