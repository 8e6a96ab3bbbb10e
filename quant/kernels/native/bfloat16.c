/* Products of a few rows with bfloat16 weights as they lie in the checkpoint, sums in float32.

   Eight lanes each sum every eighth column and are added up pairwise at the end: the order depends
   on the number of columns alone, not on rows, channels or threads. For the many rows of a prompt
   torch's float32 product of widened blocks is better (quant/kernels/floats.py). */

#include "vector_types.h"

#define TILE_ROWS 4
#define TILE_CHANNELS 3 /* 12 sums, 3 weights, an activation: 16 registers */
#define AHEAD 1024      /* columns of each channel that are fetched ahead */

#define SET portable
#include "float_tile.h"
#ifdef __x86_64__
#define SET avx2
#include "float_tile.h"
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
