/* Products of activations with int8 weights, exact in integers whatever the processor.

   Activations are rows of integers q of at most 16 bits (quant/activations.py says how they come
   about), perhaps in two planes, x = scale * (RADIX * high + low). Weights are int8, packed so that
   32 output channels lie side by side:

       packed[N / 32][K / 2][32 channels][2 columns]

   A register holds the pairs of several channels; one instruction multiplies them by a pair of
   activations and adds both products in int32. So there is no horizontal sum, no saturation, and
   the weights are read once in one stream. The sums of CHUNK columns fit int32 and are added up in
   int64: the result is the same integer on every processor, in every order, at every
   number of threads.

   Compiled without any header of torch's; launcher and tests reach it through ctypes. OpenMP's
   functions are those of the library that torch has loaded, so both share one pool of threads. */

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "epilogue.h"
#include "pack.h"
#include "rows.h"

#define ROWS 6    /* most rows of a tile: 12 sums, 2 weights, an activation, a product: 16 registers */
#define CHUNK 512 /* columns whose sum fits int32: 512 * 32258 * 128 < 2^31; 16 KB of weights */
#define AHEAD 32  /* pairs of columns (64 bytes of weights each) that one row's product fetches ahead */

/* ---- one tile for each instruction set ---- */

typedef void (*block_t)(
    const int8_t *, const int16_t *, int64_t, int64_t, int64_t, int64_t *, const int8_t *);

#define NAME(x) x##_portable
#define TARGET
#define LANES 8
typedef int32_t v8i __attribute__((vector_size(32)));
typedef struct { v8i even, odd; } pairs_t;
static inline __attribute__((always_inline)) pairs_t load_pairs(const int8_t *p) {
    pairs_t w;
    for (int i = 0; i < 8; i++) w.even[i] = p[2 * i], w.odd[i] = p[2 * i + 1];
    return w;
}
static inline __attribute__((always_inline)) pairs_t repeat_pair(const int16_t *p) {
    return (pairs_t){(v8i){} + p[0], (v8i){} + p[1]};
}
static inline __attribute__((always_inline)) void add_lanes(int64_t *p, v8i sums) {
    for (int i = 0; i < 8; i++) p[i] += sums[i];
}
#define V v8i
#define W pairs_t
#define ZERO() ((v8i){})
#define LOAD_W(p) load_pairs(p)
#define LOAD_X(p) repeat_pair(p)
#define DOT(s, w, x) ((s) + (w).even * (x).even + (w).odd * (x).odd)
#define ADD_TO(p, s) add_lanes(p, s)
#define KEEP(a, b)
#include "tile.h"

#ifdef __x86_64__

__attribute__((target("avx2"))) static inline void add_lanes_avx2(int64_t *p, __m256i sums) {
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sums));
    __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sums, 1));
    __m256i *q = (__m256i *)p;
    _mm256_storeu_si256(q, _mm256_add_epi64(_mm256_loadu_si256(q), low));
    _mm256_storeu_si256(q + 1, _mm256_add_epi64(_mm256_loadu_si256(q + 1), high));
}
static inline int32_t load_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
}
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define LANES 8
#define V __m256i
#define W __m256i
#define ZERO() _mm256_setzero_si256()
#define LOAD_W(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_X(p) _mm256_set1_epi32(load_pair(p))
#define DOT(s, w, x) _mm256_add_epi32(s, _mm256_madd_epi16(w, x))
#define ADD_TO(p, s) add_lanes_avx2(p, s)
#define KEEP(a, b) __asm__ volatile("" : "+x"(a), "+x"(b)::"memory")
#include "tile.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))
TARGET static inline void add_lanes_avx512(int64_t *p, __m512i sums) {
    add_lanes_avx2(p, _mm512_castsi512_si256(sums));
    add_lanes_avx2(p + 8, _mm512_extracti64x4_epi64(sums, 1));
}
#define LANES 16
#define V __m512i
#define W __m512i
#define ZERO() _mm512_setzero_si512()
#define LOAD_W(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_X(p) _mm512_set1_epi32(load_pair(p))
#define DOT(s, w, x) _mm512_dpwssd_epi32(s, w, x)
#define ADD_TO(p, s) add_lanes_avx512(p, s)
#define KEEP(a, b) __asm__ volatile("" : "+v"(a), "+v"(b)::"memory")
#include "tile.h"

#endif

static const struct { const char *name; block_t block; } SETS[] = {
    {"portable", block_portable},
#ifdef __x86_64__
    {"avx2", block_avx2},
    {"avx512vnni", block_avx512},
#endif
};
#define NUM_SETS ((int)(sizeof SETS / sizeof SETS[0]))

/* The name of instruction set `index`, or NULL past the last; later ones are wider. */
const char *shardrun_set_name(int index) {
    return index < NUM_SETS ? SETS[index].name : 0;
}

/* Whether this processor has it. */
int shardrun_set_works(int index) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (index == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (index == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return index == 0;
}

/* ---- packing ---- */

/* Pairs of columns k of 8 rows, from src (rows `stride` bytes apart) to block[k][row], as far as
   whole registers go; returns how many. */
static int64_t transpose_8_rows(const int8_t *src, int64_t stride, int64_t pairs, uint16_t *block) {
    int64_t k = 0;
#ifdef __x86_64__
    for (; k + 8 <= pairs; k += 8) {
        __m128i a[8], b[8];
        for (int n = 0; n < 8; n++)
            a[n] = _mm_loadu_si128((const __m128i *)(src + n * stride + 2 * k));
        for (int n = 0; n < 4; n++) {
            b[2 * n] = _mm_unpacklo_epi16(a[2 * n], a[2 * n + 1]);
            b[2 * n + 1] = _mm_unpackhi_epi16(a[2 * n], a[2 * n + 1]);
        }
        for (int n = 0; n < 8; n += 4)
            for (int h = 0; h < 2; h++) {
                a[n + 2 * h] = _mm_unpacklo_epi32(b[n + h], b[n + 2 + h]);
                a[n + 2 * h + 1] = _mm_unpackhi_epi32(b[n + h], b[n + 2 + h]);
            }
        for (int n = 0; n < 4; n++) {
            uint16_t *to = block + BLOCK * (k + 2 * n);
            _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi64(a[n], a[n + 4]));
            _mm_storeu_si128((__m128i *)(to + BLOCK), _mm_unpackhi_epi64(a[n], a[n + 4]));
        }
    }
#endif
    return k;
}

/* pack.h says what it does. */
void shardrun_pack(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first) {
    int64_t num_pairs = (K + 1) / 2;
    for (int64_t n = 0, done = 0; n < N; n++) { /* done: pairs of these rows packed already */
        int64_t at = (first + n) % BLOCK;
        const int8_t *row = src + n * stride;
        uint16_t *block = (uint16_t *)packed + (first + n - at) * num_pairs;
        if (n == 0 || at == 0) touch_pages(block, 2 * BLOCK * num_pairs);
        if (n == 0 || at % 8 == 0)
            done = at % 8 == 0 && n + 8 <= N ? transpose_8_rows(row, stride, K / 2, block + at) : 0;
        for (int64_t k = done; k < K / 2; k++) memcpy(block + BLOCK * k + at, row + 2 * k, 2);
        if (K % 2) {
            int8_t last[2] = {row[K - 1], 0};
            memcpy(block + BLOCK * (num_pairs - 1) + at, last, 2);
        }
    }
}

/* ---- the product ---- */

/* One row as integers, a zero after an odd number; returns its scale.
   given: the amax of a longer row that this is a part of, or NULL. */
static float quantize_row(
    row_functions_t f, const void *x, int64_t K, float levels, int16_t *high, int16_t *low,
    const float *given) {
    float amax = given ? *given : f.amax(x, K);
    round_row(f, x, K, amax, levels, high, low);
    if (K % 2) {
        high[K] = 0;
        if (low) low[K] = 0;
    }
    return row_scale_of(amax, levels);
}

/* One row as integers of a static scale, which is returned; NaN where the row is damaged. Of 8 bits less
   the zero point: within 255, so that the product has nothing to correct. */
static float quantize_static(
    row_functions_t f, const void *x, int64_t K, float scale, int64_t zero_point, int16_t *q) {
    int is_finite = f.clamp(x, K, scale, (int32_t)zero_point, q);
    if (!is_finite) memset(q, 0, 2 * K);
    if (K % 2) q[K] = 0;
    return is_finite ? scale : NAN;
}

typedef struct {
    block_t block;
    int64_t M, K, N, num_planes, stride; /* stride: int16 between rows of q */
    const int16_t *q;                    /* [planes][M][stride] */
    const float *row_scale;              /* [M] */
    const int8_t *packed;
    epilogue_t end;
} product_t;

static void finish(const product_t *p, int64_t m, int64_t n0, int64_t *sums, const int64_t *low) {
    int64_t count = p->N - n0 < BLOCK ? p->N - n0 : BLOCK;
    if (low)
        for (int64_t n = 0; n < count; n++) sums[n] = RADIX * sums[n] + low[n];
    if (p->end.out_type >= INT32) {
        store_sums(&p->end, m * p->N + n0, count, sums);
        return;
    }
    float values[BLOCK];
    for (int64_t n = 0; n < count; n++) values[n] = (float)sums[n];
    scale_sums(&p->end, m, n0, count, values, p->row_scale[m]);
}

/* One block of channels times some rows. */
static void multiply(const product_t *p, int64_t block, int64_t m0, int64_t rows) {
    int64_t sums[2 * PANEL * BLOCK], num_pairs = (p->K + 1) / 2;
    memset(sums, 0, p->num_planes * rows * BLOCK * sizeof *sums);
    /* The planes of all rows lie behind one another and are multiplied as one. */
    int64_t at_once = rows == p->M ? p->num_planes : 1;
    for (int64_t k = 0; k < num_pairs; k += CHUNK / 2) {
        int64_t pairs = num_pairs - k < CHUNK / 2 ? num_pairs - k : CHUNK / 2;
        const int8_t *w = p->packed + (block * num_pairs + k) * 2 * BLOCK;
        for (int64_t plane = 0; plane < p->num_planes; plane += at_once)
            p->block(
                w, p->q + (plane * p->M + m0) * p->stride + 2 * k, p->stride, at_once * rows, pairs,
                sums + plane * rows * BLOCK, w + 2 * BLOCK * pairs);
    }
    for (int64_t m = 0; m < rows; m++)
        finish(
            p, m0 + m, block * BLOCK, sums + m * BLOCK,
            p->num_planes == 2 ? sums + (rows + m) * BLOCK : 0);
}

/* The product's arguments.

   set: index of an instruction set that works here. x: [M, K] of x_type (FLOAT32, BFLOAT16), rows
   x_stride elements apart. amax: NULL, or for each row the largest absolute value of the longer row
   that it is a part of. input_scale: NULL, or the one scale of static activations, and zero_point: of
   theirs, -128 to 127. levels: the largest |q|; above 32767 it takes two planes. scale: [N]. bias: [N]
   of bias_type or NULL. out: [M, N] of out_type; INT32 and INT64 take the bare sums. damaged: NULL, or
   room for M, which become 1 for a row that holds an infinity or a NaN, else 0.
   work: room for planes * M * (K rounded up to even, + 16) int16 and, behind them, M floats. */
typedef struct {
    int64_t set;
    const void *x;
    int64_t x_type, x_stride;
    const float *amax, *input_scale;
    int64_t zero_point, M, K, levels;
    const int8_t *packed;
    int64_t N;
    const float *scale;
    const void *bias;
    int64_t bias_type;
    void *out;
    int64_t out_type;
    int32_t *damaged;
    void *work;
} linear_t;

/* out = x @ W.T * scale + bias. */
int shardrun_linear(const linear_t *a) {
    /* Rows begin in different banks of the cache. */
    int64_t M = a->M, K = a->K, num_planes = a->levels > 32767 ? 2 : 1, stride = (K + 1) / 2 * 2 + 16;
    int16_t *q = a->work;
    float *row_scale = (float *)(q + num_planes * M * stride);
    product_t p = {SETS[a->set].block, M, K, a->N, num_planes, stride, q, row_scale, a->packed,
                   {a->scale, a->bias, a->bias_type, a->out, a->out_type, a->N}};
    row_functions_t f = row_functions(a->set, a->x_type);
    int64_t size = a->x_type == FLOAT32 ? 4 : 2, num_blocks = (a->N + BLOCK - 1) / BLOCK, num_rounds = (M + ROUND - 1) / ROUND;
#pragma omp parallel if (a->N * K * M > 65536)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            const char *x = (const char *)a->x + m * a->x_stride * size;
            if (a->input_scale)
                row_scale[m] = quantize_static(
                    f, x, K, *a->input_scale, a->zero_point, q + m * stride);
            else
                row_scale[m] = quantize_row(
                    f, x, K, (float)a->levels, q + m * stride,
                    num_planes == 2 ? q + (M + m) * stride : 0, a->amax ? a->amax + m : 0);
            if (a->damaged) a->damaged[m] = isnan(row_scale[m]);
        }
/* A core that others use too takes fewer blocks. */
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < num_rounds * num_blocks; i++) {
            int64_t first = i / num_blocks * ROUND, end = M - first < ROUND ? M : first + ROUND;
            for (int64_t m = first; m < end; m += PANEL)
                multiply(&p, i % num_blocks, m, end - m < PANEL ? end - m : PANEL);
        }
    }
    return 0;
}

/* x: [M, K] of x_type, rows x_stride elements apart. amax: [M]. */
typedef struct {
    int64_t set;
    const void *x;
    int64_t x_type, x_stride, M, K;
    float *amax;
} row_amax_t;

/* The largest absolute value of each row; NaN where it holds one. */
int shardrun_row_amax(const row_amax_t *a) {
    row_functions_t f = row_functions(a->set, a->x_type);
    int64_t size = a->x_type == FLOAT32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (a->M > 1 && a->M * a->K > SMALL)
    for (int64_t m = 0; m < a->M; m++)
        a->amax[m] = f.amax((const char *)a->x + m * a->x_stride * size, a->K);
    return 0;
}

/* sums: [M, N] of sums_type (FLOAT32, INT32, INT64). amax: [M], of the whole rows; or input_scale, and
   damaged: [M], above 0 for rows that are to be NaN. scale: [N], or NULL where the sums are scaled
   already. The rest as above. */
typedef struct {
    const void *sums;
    int64_t sums_type;
    const float *amax, *input_scale;
    const int32_t *damaged;
    int64_t levels, M, N;
    const float *scale;
    const void *bias;
    int64_t bias_type;
    void *out;
    int64_t out_type;
} finish_t;

/* out = sums * row_scale * scale + bias: what the sums that were added up between ranks stand for. */
int shardrun_finish(const finish_t *a) {
    epilogue_t e = {a->scale, a->bias, a->bias_type, a->out, a->out_type, a->N};
#pragma omp parallel for schedule(static) if (a->M > 1 && a->M * a->N > SMALL)
    for (int64_t m = 0; m < a->M; m++) {
        float row_scale = a->input_scale ? a->damaged[m] ? NAN : *a->input_scale
                                         : row_scale_of(a->amax[m], (float)a->levels);
        for (int64_t n = 0; n < a->N; n += BLOCK) {
            int64_t at = m * a->N + n, count = a->N - n < BLOCK ? a->N - n : BLOCK;
            float sums[BLOCK];
            for (int64_t i = 0; i < count; i++)
                sums[i] = a->sums_type == FLOAT32 ? ((const float *)a->sums)[at + i]
                          : a->sums_type == INT32 ? (float)((const int32_t *)a->sums)[at + i]
                                                  : (float)((const int64_t *)a->sums)[at + i];
            scale_sums(&e, m, n, count, sums, row_scale);
        }
    }
    return 0;
}
