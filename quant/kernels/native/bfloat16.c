/* Products of a few rows with bfloat16 weights as they lie in the checkpoint, sums in float32.

   Eight lanes each sum every eighth column and are added up pairwise at the end: the order depends
   on the number of columns alone, not on rows, channels or threads. For the many rows of a prompt
   torch's float32 product of widened blocks is better (quant/kernels/floats.py). */

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "types.h"

#define TILE_ROWS 4
#define TILE_CHANNELS 3 /* 12 sums, 3 weights, an activation: 16 registers */
#define AHEAD 1024      /* columns of each channel that are fetched ahead */
#define LANES 8

typedef float v8f __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef uint32_t v8u __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE v8f widened_portable(const uint16_t *p) {
    v8h bits;
    memcpy(&bits, p, sizeof bits);
    v8u wide = __builtin_convertvector(bits, v8u) << 16;
    return (v8f)wide;
}
#define TILE_portable(sum, w, x) ((sum) + (w) * (x))

#define DEFINE_TILE(SET, TARGET, WIDENED, MULTIPLY_ADD)                                            \
    TARGET INLINE void tile_##SET(                                                                 \
        const uint16_t *w, int64_t K, const float *x, int64_t stride, const int rows,              \
        const int channels, float *out, int64_t out_stride) {                                      \
        v8f sums[TILE_ROWS][TILE_CHANNELS];                                                        \
        for (int m = 0; m < rows; m++)                                                             \
            for (int n = 0; n < channels; n++) sums[m][n] = (v8f){};                               \
        int64_t whole = K / LANES * LANES;                                                         \
        for (int64_t k = 0; k < whole; k += LANES) {                                               \
            v8f weights[TILE_CHANNELS];                                                            \
            for (int n = 0; n < channels; n++) {                                                   \
                __builtin_prefetch(w + n * K + k + AHEAD, 0, 3);                                   \
                weights[n] = WIDENED(w + n * K + k);                                               \
            }                                                                                      \
            for (int m = 0; m < rows; m++) {                                                       \
                v8f value;                                                                         \
                memcpy(&value, x + m * stride + k, sizeof value);                                  \
                for (int n = 0; n < channels; n++)                                                 \
                    sums[m][n] = MULTIPLY_ADD(sums[m][n], weights[n], value);                      \
            }                                                                                      \
        }                                                                                          \
        for (int m = 0; m < rows; m++)                                                             \
            for (int n = 0; n < channels; n++) {                                                   \
                v8f s = sums[m][n];                                                                \
                float total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));   \
                for (int64_t k = whole; k < K; k++)                                                \
                    total += widen_bfloat16(w[n * K + k]) * x[m * stride + k];                     \
                out[m * out_stride + n] = total;                                                   \
            }                                                                                      \
    }                                                                                              \
    /* All rows times some channels; the weights of the channels stay in cache. */                 \
    TARGET static void channels_##SET(                                                             \
        const uint16_t *w, int64_t K, const float *x, int64_t stride, int64_t M, int64_t channels, \
        float *out, int64_t out_stride) {                                                          \
        for (int64_t m = 0; m < M; m += TILE_ROWS) {                                               \
            int64_t rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;                                  \
            const float *x_m = x + m * stride;                                                     \
            float *out_m = out + m * out_stride;                                                   \
            if (channels == TILE_CHANNELS && rows == 4)                                            \
                tile_##SET(w, K, x_m, stride, 4, 3, out_m, out_stride);                            \
            else if (channels == TILE_CHANNELS && rows == 3)                                       \
                tile_##SET(w, K, x_m, stride, 3, 3, out_m, out_stride);                            \
            else if (channels == TILE_CHANNELS && rows == 2)                                       \
                tile_##SET(w, K, x_m, stride, 2, 3, out_m, out_stride);                            \
            else if (channels == TILE_CHANNELS)                                                    \
                tile_##SET(w, K, x_m, stride, 1, 3, out_m, out_stride);                            \
            else                                                                                   \
                for (int64_t n = 0; n < channels; n++)                                             \
                    for (int64_t r = 0; r < rows; r++)                                             \
                        tile_##SET(                                                                \
                            w + n * K, K, x_m + r * stride, stride, 1, 1,                          \
                            out_m + r * out_stride + n, out_stride);                               \
        }                                                                                          \
    }

DEFINE_TILE(portable, , widened_portable, TILE_portable)

#ifdef __x86_64__
#define AVX2 __attribute__((target("avx2,fma")))
AVX2 INLINE v8f widened_avx2(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (v8f)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#define TILE_avx2(sum, w, x) ((v8f)_mm256_fmadd_ps((__m256)(w), (__m256)(x), (__m256)(sum)))
DEFINE_TILE(avx2, AVX2, widened_avx2, TILE_avx2)
#endif

/* out = x @ w.T + bias, float32.

   x: float32 [M, K], rows x_stride elements apart. w: bfloat16 [N, K]. bias: [N] or NULL.
   out: [M, N]. set: as for shardrun_linear; every set above 0 has AVX2 and FMA. */
void shardrun_bfloat16(
    int set, const float *x, int64_t x_stride, int64_t M, int64_t K, const uint16_t *w, int64_t N,
    const float *bias, float *out) {
    void (*multiply)(
        const uint16_t *, int64_t, const float *, int64_t, int64_t, int64_t, float *, int64_t) =
        channels_portable;
#ifdef __x86_64__
    if (set > 0) multiply = channels_avx2;
#endif
    (void)set;
    int64_t num_tiles = (N + TILE_CHANNELS - 1) / TILE_CHANNELS;
#pragma omp parallel for schedule(static) if (N * K * M > 65536)
    for (int64_t t = 0; t < num_tiles; t++) {
        int64_t n = t * TILE_CHANNELS, channels = N - n < TILE_CHANNELS ? N - n : TILE_CHANNELS;
        multiply(w + n * K, K, x, x_stride, M, channels, out + n, N);
        if (bias)
            for (int64_t m = 0; m < M; m++)
                for (int64_t c = 0; c < channels; c++) out[m * N + n + c] += bias[n + c];
    }
}
