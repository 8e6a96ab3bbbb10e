/* A weight becomes integers: the largest value of each group of columns, and, once its scale is known,
   the values divided by it and rounded, ties to even. The rule between the two is Python's
   (quant/numeric.py). One thread: whoever prepares a checkpoint has a tensor for each core. */

#include "vector_types.h"

/* A float16 that is neither an infinity nor a NaN: its exponent is put right by an exact product. */
static inline float widen_finite_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

#define SET portable
#include "rounding.h"
#ifdef __x86_64__
#define SET avx2
#include "rounding.h"
#endif

typedef struct {
    int64_t set;
    const void *x;
    int64_t type, stride, N, K, S;
    void *amax;
} group_amax_t;

/* amax[n, g] = the largest |x[n, k]| of the columns gS <= k < (g + 1)S, in x's own type; a NaN, or else
   an infinity, where there is one. Rows of x are `stride` elements apart; a last group may be short. */
int shardrun_group_amax(const group_amax_t *a) {
    int64_t G = (a->K + a->S - 1) / a->S;
    for (int64_t n = 0; n < a->N; n++)
        for (int64_t g = 0; g < G; g++) {
            int64_t first = g * a->S, count = a->K - first < a->S ? a->K - first : a->S;
            CHOOSE(a->set, amax_run)
                (a->x, a->type, n * a->stride + first, count, a->amax, n * G + g);
        }
    return 0;
}

typedef struct {
    int64_t set;
    const void *x;
    int64_t type, stride, N, K, S;
    const float *scale;
    int64_t lowest, highest;
    int8_t *out;
} round_groups_t;

/* out[n, k] = clamp(round(x[n, k] / scale[n, k / S]), lowest, highest), ties to even. Quotients must be
   within 2^22, as those by a scale that fits the group are. */
int shardrun_round_groups(const round_groups_t *a) {
    int64_t G = (a->K + a->S - 1) / a->S;
    for (int64_t n = 0; n < a->N; n++)
        for (int64_t g = 0; g < G; g++) {
            int64_t first = g * a->S, count = a->K - first < a->S ? a->K - first : a->S;
            CHOOSE(a->set, round_run)
                (a->x, a->type, n * a->stride + first, count, a->scale[n * G + g], (float)a->lowest,
                 (float)a->highest, a->out + n * a->K + first);
        }
    return 0;
}
