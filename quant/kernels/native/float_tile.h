/* A few rows times a few channels of bfloat16 weights, for one instruction set; see vector.h. */

#include "vector.h"

TARGET INLINE void NAME(tile)(
    const uint16_t *w, int64_t K, const float *x, int64_t stride, const int rows, const int channels,
    float *out, int64_t out_stride) {
    v8f sums[TILE_ROWS][TILE_CHANNELS];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) sums[m][n] = (v8f){};
    int64_t whole = K / 8 * 8;
    for (int64_t k = 0; k < whole; k += 8) {
        v8f weights[TILE_CHANNELS];
        for (int n = 0; n < channels; n++) {
            __builtin_prefetch(w + n * K + k + AHEAD, 0, 3);
            weights[n] = NAME(widened)(w + n * K + k);
        }
        for (int m = 0; m < rows; m++) {
            v8f value = NAME(load8)(x, FLOAT32, m * stride + k);
            for (int n = 0; n < channels; n++)
                sums[m][n] = MULTIPLY_ADD(sums[m][n], weights[n], value);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) {
            float total = NAME(sum8)(sums[m][n]);
            for (int64_t k = whole; k < K; k++)
                total += widen_bfloat16(w[n * K + k]) * x[m * stride + k];
            out[m * out_stride + n] = total;
        }
}

/* All rows times some channels; the weights of the channels stay in cache. */
TARGET static void NAME(channels)(
    const uint16_t *w, int64_t K, const float *x, int64_t stride, int64_t M, int64_t channels,
    float *out, int64_t out_stride) {
    for (int64_t m = 0; m < M; m += TILE_ROWS) {
        int64_t rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;
        const float *x_m = x + m * stride;
        float *out_m = out + m * out_stride;
        if (channels < TILE_CHANNELS) {
            for (int64_t n = 0; n < channels; n++)
                for (int64_t r = 0; r < rows; r++)
                    NAME(tile)(
                        w + n * K, K, x_m + r * stride, stride, 1, 1, out_m + r * out_stride + n,
                        out_stride);
            continue;
        }
        switch (rows) {
        case 1: NAME(tile)(w, K, x_m, stride, 1, TILE_CHANNELS, out_m, out_stride); break;
        case 2: NAME(tile)(w, K, x_m, stride, 2, TILE_CHANNELS, out_m, out_stride); break;
        case 3: NAME(tile)(w, K, x_m, stride, 3, TILE_CHANNELS, out_m, out_stride); break;
        default: NAME(tile)(w, K, x_m, stride, 4, TILE_CHANNELS, out_m, out_stride); break;
        }
    }
}

#include "end_vector.h"
