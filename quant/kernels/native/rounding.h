/* One group of columns, for one instruction set; see vector.h. The loops are the compiler's to make
   vectors of. */

#include "vector.h"

/* The bits of absolute values are ordered as the values are, a NaN above all. */
TARGET static void NAME(amax_run)(
    const void *x, int type, int64_t at, int64_t count, void *amax, int64_t to) {
    if (type == FLOAT32) {
        const int32_t *bits = (const int32_t *)x + at;
        int32_t most = 0;
        for (int64_t k = 0; k < count; k++) {
            int32_t value = bits[k] & 0x7fffffff;
            most = value > most ? value : most;
        }
        ((int32_t *)amax)[to] = most;
        return;
    }
    const int16_t *bits = (const int16_t *)x + at;
    int16_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        int16_t value = bits[k] & 0x7fff;
        most = value > most ? value : most;
    }
    ((int16_t *)amax)[to] = most;
}

TARGET INLINE int8_t NAME(rounded)(float value, float scale, float lowest, float highest) {
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer, ties to even */
    float integer = (value / scale + magic) - magic;
    integer = integer < lowest ? lowest : integer;
    integer = integer > highest ? highest : integer;
    return (int8_t)(int32_t)integer;
}

TARGET static void NAME(round_run)(
    const void *x, int type, int64_t at, int64_t count, float scale, float lowest, float highest,
    int8_t *out) {
    if (type == FLOAT32) {
        const float *values = (const float *)x + at;
        for (int64_t k = 0; k < count; k++)
            out[k] = NAME(rounded)(values[k], scale, lowest, highest);
        return;
    }
    const uint16_t *halves = (const uint16_t *)x + at;
    if (type == FLOAT16) {
        for (int64_t k = 0; k < count; k++)
            out[k] = NAME(rounded)(widen_finite_half(halves[k]), scale, lowest, highest);
        return;
    }
    for (int64_t k = 0; k < count; k++)
        out[k] = NAME(rounded)(widen_bfloat16(halves[k]), scale, lowest, highest);
}

#include "end_vector.h"
