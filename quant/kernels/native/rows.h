/* Rows of activations as integers (quant/activations.py). */

#ifndef SHARDRUN_ROWS_H
#define SHARDRUN_ROWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#define RADIX 254         /* of the planes: x = scale * (RADIX * high + low) */
#define LEVELS_INT8 127   /* of activations of 8 bits */
#define LEAST_AMAX 1e-30f /* whose inverse is finite */

/* amax: the largest absolute value of a row; a NaN counts as larger than all. round: x * inverse as
   integers. clamp: x / scale as integers of 8 bits, less a zero point, which moves their range; returns
   whether all of x is finite. */
#define ROW_FUNCTIONS(SUFFIX, ATTRIBUTE, TYPE)                                                    \
    ATTRIBUTE static float row_amax_##SUFFIX(const void *x, int64_t K) {                          \
        int32_t most = 0;                                                                         \
        for (int64_t k = 0; k < K; k++) {                                                         \
            float value = widen(x, TYPE, k);                                                      \
            int32_t bits;                                                                         \
            memcpy(&bits, &value, sizeof bits);                                                   \
            bits &= 0x7fffffff;                                                                   \
            most = bits > most ? bits : most;                                                     \
        }                                                                                         \
        float amax;                                                                               \
        memcpy(&amax, &most, sizeof amax);                                                        \
        return amax;                                                                              \
    }                                                                                             \
    ATTRIBUTE static void row_round_##SUFFIX(                                                     \
        const void *x, int64_t K, float inverse, int16_t *high, int16_t *low) {                   \
        const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to integer, ties to even */ \
        if (!low)                                                                                 \
            for (int64_t k = 0; k < K; k++)                                                       \
                high[k] = (int16_t)(int32_t)((widen(x, TYPE, k) * inverse + magic) - magic);      \
        else                                                                                      \
            for (int64_t k = 0; k < K; k++) {                                                     \
                int32_t q = (int32_t)rintf(widen(x, TYPE, k) * inverse);                          \
                int32_t top = (int32_t)((q * (1.0f / RADIX) + magic) - magic);                   \
                high[k] = (int16_t)top;                                                           \
                low[k] = (int16_t)(q - RADIX * top);                                                \
            }                                                                                     \
    }                                                                                             \
    ATTRIBUTE static int row_clamp_##SUFFIX(                                                      \
        const void *x, int64_t K, float scale, int32_t zero_point, int16_t *q) {                  \
        const float magic = 12582912.0f;                                                          \
        const int16_t lowest = (int16_t)(-128 - zero_point);                                      \
        const int16_t highest = (int16_t)(127 - zero_point);                                      \
        int32_t most = 0;                                                                         \
        for (int64_t k = 0; k < K; k++) {                                                         \
            float value = widen(x, TYPE, k);                                                      \
            int32_t bits;                                                                         \
            memcpy(&bits, &value, sizeof bits);                                                   \
            bits &= 0x7fffffff;                                                                   \
            most = bits > most ? bits : most;                                                     \
            value /= scale;                                                                       \
            memcpy(&bits, &value, sizeof bits);                                                   \
            /* Clamped as integers, which takes no branch: within +-256, a NaN too. */            \
            int32_t size = bits & 0x7fffffff;                                                     \
            size = size < 0x43800000 ? size : 0x43800000;                                         \
            bits = size | (bits & (int32_t)0x80000000);                                           \
            memcpy(&value, &bits, sizeof bits);                                                   \
            int16_t rounded = (int16_t)(int32_t)((value + magic) - magic);                        \
            rounded = rounded < highest ? rounded : highest;                                      \
            q[k] = rounded > lowest ? rounded : lowest;                                           \
        }                                                                                         \
        return most < 0x7f800000;                                                                 \
    }
ROW_FUNCTIONS(f32, , FLOAT32)
ROW_FUNCTIONS(bf16, , BFLOAT16)
#ifdef __x86_64__
#define TARGET_ROWS __attribute__((target("avx2")))
ROW_FUNCTIONS(f32_avx2, TARGET_ROWS, FLOAT32)
ROW_FUNCTIONS(bf16_avx2, TARGET_ROWS, BFLOAT16)
#endif

typedef struct {
    float (*amax)(const void *, int64_t);
    void (*round)(const void *, int64_t, float, int16_t *, int16_t *);
    int (*clamp)(const void *, int64_t, float, int32_t, int16_t *);
} row_functions_t;

static row_functions_t row_functions(int64_t set, int64_t type) {
#ifdef __x86_64__
    if (set > PORTABLE)
        return type == FLOAT32
                   ? (row_functions_t){row_amax_f32_avx2, row_round_f32_avx2, row_clamp_f32_avx2}
                   : (row_functions_t){row_amax_bf16_avx2, row_round_bf16_avx2, row_clamp_bf16_avx2};
#endif
    return type == FLOAT32 ? (row_functions_t){row_amax_f32, row_round_f32, row_clamp_f32}
                           : (row_functions_t){row_amax_bf16, row_round_bf16, row_clamp_bf16};
}

/* What one integer of a row stands for; NaN where amax is no finite number. */
static float row_scale_of(float amax, float levels) {
    if (!isfinite(amax)) return NAN;
    return (amax < LEAST_AMAX ? LEAST_AMAX : amax) / levels;
}

/* A part of a row as integers, x / scale rounded. A row that holds an infinity or a NaN gets zeros and,
   from row_scale_of, a NaN as scale, which makes its whole output one. */
static inline void round_row(
    row_functions_t f, const void *x, int64_t K, float amax, float levels, int16_t *high,
    int16_t *low) {
    if (!isfinite(amax)) {
        memset(high, 0, 2 * K);
        if (low) memset(low, 0, 2 * K);
    } else f.round(x, K, levels / (amax < LEAST_AMAX ? LEAST_AMAX : amax), high, low);
}

#endif
