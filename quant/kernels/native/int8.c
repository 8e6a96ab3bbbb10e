/* Products of activations with int8 weights, exact in integers whatever the processor.

   Activations are rows of integers q of at most 16 bits (quant/activations.py says how they come
   about), perhaps in two planes, x = scale * (RADIX * high + low). Weights are int8, packed so that
   32 output channels lie side by side, a few columns (`width`) of each:

       packed[N / 32][K / width][32 channels][width columns]

   A register holds these columns of several channels; one instruction multiplies them by as many of an
   activation and adds the products in int32: pairs of 16 bits, or quads of 8 bits (int8_sets.h says
   which has these). So there is no horizontal sum, no saturation, and
   the weights are read once in one stream. The sums of CHUNK columns fit int32 and are added up in
   int64: the result is the same integer on every processor, in every order, at every
   number of threads.

   Quads are of unsigned activations: q + offset. Behind the weights of a block lie the sums of its
   channels' weights, int32, whose `offset`-fold comes off in the end.

   Compiled without any header of torch's; launcher and tests reach it through ctypes. OpenMP's
   functions are those of the library that torch has loaded, so both share one pool of threads. */

#include <stdint.h>
#include <string.h>

#include "epilogue.h"
#include "int8_sets.h"
#include "pack.h"
#include "rows.h"

/* The name of instruction set `index`, or NULL past the last; later ones are wider. */
const char *shardrun_set_name(int index) {
    return index < NUM_SETS ? SETS[index].name : 0;
}

/* Whether this processor has it. */
int shardrun_set_works(int index) { return SETS[index].works(); }

/* Columns of a channel side by side in weights that are multiplied by activations of `levels`. */
int shardrun_width(int set, int64_t levels) {
    return levels == LEVELS_INT8 && SETS[set].quads ? QUAD : PAIR;
}

/* ---- packing ---- */

#ifdef __x86_64__
/* Words of 8 rows, from src (rows `stride` bytes apart) to block[k][row]; `count` a multiple of 8. */
static void transpose_pairs(const int8_t *src, int64_t stride, int64_t count, uint16_t *block) {
    for (int64_t k = 0; k < count; k += 8) {
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
}

static void transpose_quads(const int8_t *src, int64_t stride, int64_t count, uint32_t *block) {
    for (int64_t k = 0; k < count; k += 4)
        for (int n = 0; n < 8; n += 4) {
            __m128i a[4], b[4];
            for (int i = 0; i < 4; i++)
                a[i] = _mm_loadu_si128((const __m128i *)(src + (n + i) * stride + 4 * k));
            for (int i = 0; i < 2; i++) {
                b[i] = _mm_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 + i] = _mm_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for (int i = 0; i < 2; i++) {
                __m128i *to = (__m128i *)(block + BLOCK * (k + 2 * i) + n);
                _mm_storeu_si128(to, _mm_unpacklo_epi64(b[2 * i], b[2 * i + 1]));
                _mm_storeu_si128(to + BLOCK / 4, _mm_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
            }
        }
}
#endif

/* The words of 8 rows, which lie side by side in a block, as far as whole registers go; how many. */
static int64_t transpose_8_rows(
    const int8_t *src, int64_t stride, int64_t count, int64_t width, int8_t *block) {
#ifdef __x86_64__
    count -= count % 8;
    if (width == PAIR) transpose_pairs(src, stride, count, (uint16_t *)block);
    else transpose_quads(src, stride, count, (uint32_t *)block);
    return count;
#else
    return 0;
#endif
}

static int64_t num_words(int64_t K, int64_t width) { return (K + width - 1) / width; }

/* Bytes of a block, with the sums of its channels behind quads. */
static int64_t block_bytes(int64_t K, int64_t width) {
    return BLOCK * width * (num_words(K, width) + (width == QUAD));
}

static int32_t sum_of(const int8_t *row, int64_t K) {
    int32_t sum = 0;
    for (int64_t k = 0; k < K; k++) sum += row[k];
    return sum;
}

static void pack(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first,
    int64_t width) {
    int64_t size = block_bytes(K, width), count = num_words(K, width), rest = K % width;
    for (int64_t n = 0, done = 0; n < N; n++) { /* done: words of these rows packed already */
        int64_t at = (first + n) % BLOCK;
        const int8_t *row = src + n * stride;
        int8_t *block = packed + (first + n) / BLOCK * size, *words = block + width * at;
        if (n == 0 || at == 0) touch_pages(block, size);
        if (n == 0 || at % 8 == 0)
            done = at % 8 == 0 && n + 8 <= N ? transpose_8_rows(row, stride, K / width, width, words) : 0;
        for (int64_t k = done; k < K / width; k++)
            memcpy(words + BLOCK * width * k, row + width * k, width);
        if (rest) {
            int8_t last[QUAD] = {0};
            memcpy(last, row + K - rest, rest);
            memcpy(words + BLOCK * width * (count - 1), last, width);
        }
        if (width == QUAD) {
            int32_t sum = sum_of(row, K);
            memcpy(words + BLOCK * width * count, &sum, sizeof sum);
        }
    }
}

/* pack.h says what they do. */
void shardrun_pack_pairs(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first) {
    pack(src, stride, N, K, packed, first, PAIR);
}

void shardrun_pack_quads(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first) {
    pack(src, stride, N, K, packed, first, QUAD);
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
   the zero point: within 255. */
static float quantize_static(
    row_functions_t f, const void *x, int64_t K, float scale, int64_t zero_point, int16_t *q) {
    int is_finite = f.clamp(x, K, scale, (int32_t)zero_point, q);
    if (!is_finite) memset(q, 0, 2 * K);
    if (K % 2) q[K] = 0;
    return is_finite ? scale : NAN;
}

/* A row of integers as bytes in its place, each `offset` more; integers of zero up to a whole quad. */
static void to_bytes(int16_t *q, int64_t K, int16_t offset) {
    for (int64_t k = 0; k < K; k += 64) {
        int16_t wide[64] = {0};
        uint8_t bytes[64];
        int64_t count = K - k < 64 ? K - k : 64;
        memcpy(wide, q + k, 2 * count);
        for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(wide[i] + offset);
        memcpy((uint8_t *)q + k, bytes, (count + QUAD - 1) / QUAD * QUAD);
    }
}

typedef struct {
    block_t block;
    int64_t width, M, K, N, num_planes, stride; /* stride: int16 between rows of q */
    const int16_t *q;                           /* [planes][M][stride]; as bytes for quads */
    int64_t offset;                             /* of these bytes */
    const float *row_scale;                     /* [M] */
    const int8_t *packed;
    epilogue_t end;
} product_t;

/* of_weights: the sums of the block's channels, or NULL. */
static void finish(
    const product_t *p, int64_t m, int64_t n0, int64_t *sums, const int64_t *low,
    const int32_t *of_weights) {
    int64_t count = p->N - n0 < BLOCK ? p->N - n0 : BLOCK;
    if (of_weights)
        for (int64_t n = 0; n < count; n++) sums[n] -= p->offset * of_weights[n];
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
    int64_t sums[2 * PANEL * BLOCK], count = num_words(p->K, p->width), most = CHUNK / p->width;
    int64_t line = BLOCK * p->width;
    const int8_t *weights = p->packed + block * block_bytes(p->K, p->width);
    const int32_t *of_weights = p->width == QUAD ? (const int32_t *)(weights + line * count) : 0;
    memset(sums, 0, p->num_planes * rows * BLOCK * sizeof *sums);
    /* The planes of all rows lie behind one another and are multiplied as one. */
    int64_t at_once = rows == p->M ? p->num_planes : 1;
    for (int64_t k = 0; k < count; k += most) {
        int64_t words = count - k < most ? count - k : most;
        const int8_t *w = weights + line * k;
        for (int64_t plane = 0; plane < p->num_planes; plane += at_once)
            p->block(
                w, (const char *)(p->q + (plane * p->M + m0) * p->stride) + WORD * k, 2 * p->stride,
                at_once * rows, words, sums + plane * rows * BLOCK, w + line * words);
    }
    for (int64_t m = 0; m < rows; m++)
        finish(
            p, m0 + m, block * BLOCK, sums + m * BLOCK,
            p->num_planes == 2 ? sums + (rows + m) * BLOCK : 0, of_weights);
}

/* The product's arguments.

   set: index of an instruction set that works here. x: [M, K] of x_type (FLOAT32, BFLOAT16), rows
   x_stride elements apart. amax: NULL, or for each row the largest absolute value of the longer row
   that it is a part of. input_scale: NULL, or the one scale of static activations, and zero_point: of
   theirs, -128 to 127. levels: the largest |q|; above 32767 it takes two planes. scale: [N]. bias: [N]
   of bias_type or NULL. out: [M, N] of out_type; INT32 and INT64 take the bare sums. damaged: NULL, or
   room for M, which become 1 for a row that holds an infinity or a NaN, else 0. packed: of the width of
   these levels.
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
    int64_t width = shardrun_width(a->set, a->levels), offset = 128 + a->zero_point;
    product_t p = {width == QUAD ? SETS[a->set].quads : SETS[a->set].pairs,
                   width, M, K, a->N, num_planes, stride, q, offset, row_scale, a->packed,
                   {a->scale, a->bias, a->bias_type, a->out, a->out_type, a->N}};
    row_functions_t f = row_functions(a->set, a->x_type);
    int64_t size = a->x_type == FLOAT32 ? 4 : 2, num_blocks = (a->N + BLOCK - 1) / BLOCK;
    int64_t at_once = round_rows(M), num_rounds = (M + at_once - 1) / at_once;
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
            if (width == QUAD) to_bytes(q + m * stride, K, (int16_t)offset);
            if (a->damaged) a->damaged[m] = isnan(row_scale[m]);
        }
/* A core that others use too takes fewer blocks. */
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < num_rounds * num_blocks; i++) {
            int64_t first = i / num_blocks * at_once, end = M - first < at_once ? M : first + at_once;
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
