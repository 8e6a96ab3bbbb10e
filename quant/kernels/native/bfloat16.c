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

/* x: [M, K] of x_type, rows x_stride elements apart. w: bfloat16 [N, K]. bias: [N] of bias_type or
   NULL. out: [M, N] of out_type. work: room for M * K floats, and M * N more where out_type is
   BFLOAT16. set: as for shardrun_linear; every set above 0 has AVX2 and FMA. */
typedef struct {
    int64_t set;
    const void *x;
    int64_t x_type, x_stride, M, K;
    const uint16_t *w;
    int64_t N;
    const void *bias;
    int64_t bias_type;
    void *out;
    int64_t out_type;
    float *work;
} bfloat16_t;

/* out = x @ w.T + bias. */
int shardrun_bfloat16(const bfloat16_t *a) {
    void (*multiply)(
        const uint16_t *, int64_t, const float *, int64_t, int64_t, int64_t, float *, int64_t) =
        channels_portable;
#ifdef __x86_64__
    if (a->set > PORTABLE) multiply = channels_avx2;
#endif
    int64_t M = a->M, K = a->K, N = a->N, num_tiles = (N + TILE_CHANNELS - 1) / TILE_CHANNELS;
    float *x = a->work, *sums = a->out_type == FLOAT32 ? a->out : a->work + M * K;
#pragma omp parallel if (N * K * M > 65536)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k++) x[m * K + k] = widen(a->x, a->x_type, m * a->x_stride + k);
/* A core that others use too takes fewer tiles. */
#pragma omp for schedule(dynamic, 32) nowait
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t n = t * TILE_CHANNELS, channels = N - n < TILE_CHANNELS ? N - n : TILE_CHANNELS;
            multiply(a->w + n * K, K, x, K, M, channels, sums + n, N);
            for (int64_t m = 0; m < M; m++)
                for (int64_t at = m * N + n; at < m * N + n + channels; at++) {
                    if (a->bias) sums[at] += widen(a->bias, a->bias_type, at - m * N);
                    if (a->out_type == BFLOAT16) ((uint16_t *)a->out)[at] = to_bfloat16(sums[at]);
                }
        }
    }
    return 0;
}
