/* Products with int4 weights, and with int8 ones that have a scale for each group of columns: the bits
   of quant/kernels/reference.py, exact in integers as in int8.c.

   32 output channels lie side by side:

       int4    packed[N / 32][K / 8][32 channels][4 bytes]
       int8    packed[N / 32][K / 2][32 channels][2 columns]

   A channel's four bytes are two numbers of 16 bits, of the even columns and of the odd ones, and
   nibble i of each is that of pair i: two shifts give a register of pairs, which one instruction
   multiplies by a pair of activations. A tile has a part of the block's channels, two registers of them.
   Where there are several tiles of rows, the first one keeps the part's weights of a step widened for the
   others, in the first cache. Activations lie in steps too, so that a tile needs no address a row.

   Columns are counted from the last multiple of 8 at or before the first one's place in its group, so
   that a group begins at a multiple of 8 wherever a rank's part of a row begins. The columns before
   it, and those that the last eight lack, have zeros as activations. */

#include <stdint.h>
#include <string.h>

#include "epilogue.h"
#include "pack.h"
#include "rows.h"
#include "vector_types.h"

#define ROWS 6      /* most rows of a tile, as in int8.c */
#define STEP 512    /* most columns at a time, whose sum fits int32: 16 KB of a part widened */
#define ROW (STEP + 16) /* int16 from a row to the next: they begin in different banks of the cache */
#define AHEAD 2048  /* bytes that one row's product fetches ahead */
#define FLOAT16 4   /* a type that only scales have */

/* Any number, without arithmetic on subnormal ones, which is slow on some processors. */
static inline float widen_float16(uint16_t half) {
    uint32_t rest = half & 0x7fff, exponent = half & 0x7c00;
    uint32_t bits = (rest << 13) + ((exponent == 0x7c00 ? 224u : 112u) << 23);
    float value, tiny = (float)(int32_t)rest * 0x1p-24f;
    memcpy(&value, &bits, sizeof value);
    value = exponent ? value : tiny;
    return half & 0x8000 ? -value : value;
}

/* ---- for each instruction set ---- */

/* Where a tile has its weights from: packed ones, nibbles perhaps kept widened for the next, or those.
   One row takes all parts of a block at once. */
enum { NIBBLES_ROW, NIBBLES_ONCE, NIBBLES_KEPT, WIDE, BYTES };

typedef struct {
    int64_t source;
    int64_t part;     /* of the block */
    const void *w;    /* packed, or WIDE: int16 [num_columns / 2][channels of a part][2] */
    int16_t *wide;    /* where NIBBLES_KEPT are kept so */
    const int16_t *x; /* [rows][ROW] */
    int64_t num_columns, rows;
    int64_t first_group, group; /* columns of the first group, which may begin before, and of others */
    const float *scale;         /* [groups][32], or NULL */
    float *out;           /* [rows][32], where there are scales: the scaled sums are added to it */
    int32_t *sums;        /* [rows][32], where there are none, and so but one group: they are stored */
    const uint8_t *ahead; /* what is fetched meanwhile, ahead_step bytes for eight columns */
    int64_t ahead_step;
} tile_t;

typedef struct {
    int64_t num_parts; /* of a tile, which are two registers of channels */
    void (*tile)(const tile_t *);
    void (*add_planes)(const int32_t *, const float *, float *);
    void (*add_step)(const int32_t *, int64_t, int64_t *);
    void (*widen_scales)(const void *, int64_t, int64_t, int64_t, float *);
} set_t;
#define SET(x, lanes)                                                                             \
    {BLOCK / (2 * lanes), int4_tile_##x, add_planes_##x, add_step_##x, widen_scales_##x}

#define NAME(x) x##_portable
#define TARGET
#define LANES 8
INLINE v8i load_words(const uint8_t *p) {
    v8i words;
    memcpy(&words, p, sizeof words);
    return words;
}
INLINE pairs_t load_pairs(const int16_t *p) {
    v8i words = load_words((const uint8_t *)p);
    return (pairs_t){words << 16 >> 16, words >> 16};
}
INLINE void store_pairs(int16_t *p, pairs_t w) {
    v8i words = (w.even & 0xffff) | w.odd << 16;
    memcpy(p, &words, sizeof words);
}
#define V v8i
#define W pairs_t
#define N4 v8i
#define ZERO() ((v8i){})
#define LOAD_NIBBLES(p) load_words(p)
#define NIBBLES(v, i) ((pairs_t){(v) << (28 - 4 * (i)) >> 28, (v) << (12 - 4 * (i)) >> 28})
#define LOAD_BYTES(p) load_byte_pairs(p)
#define LOAD_W(p) load_pairs(p)
#define STORE_W(p, w) store_pairs(p, w)
#define LOAD_X(p) ((pairs_t){(v8i){} + (p)[0], (v8i){} + (p)[1]})
#define DOT(s, w, x) dot_pairs(s, w, x)
INLINE v8i dot_pairs(v8i s, pairs_t w, pairs_t x) { return s + w.even * x.even + w.odd * x.odd; }
#define STORE_V(p, s) memcpy(p, &(s), sizeof(v8i))
INLINE v8f load_floats(const float *p) {
    v8f values;
    memcpy(&values, p, sizeof values);
    return values;
}
INLINE void add_scaled(float *p, v8i sums, v8f scale) {
    v8f values = load_floats(p) + __builtin_convertvector(sums, v8f) * scale;
    memcpy(p, &values, sizeof values);
}
#define F v8f
#define LOAD_F(p) load_floats(p)
#define ADD_SCALED(p, s, f) add_scaled(p, s, f)
#define FOUR(f) for (int i = 0; i < 4; i++) f(i)
#define KEEP(a, b)
#include "int4_tile.h"

#ifdef __x86_64__

INLINE int32_t load_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
}

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define DOT(s, w, x) _mm256_add_epi32(s, _mm256_madd_epi16(w, x))
#include "int4_avx2.h"
#include "int4_tile.h"

#if HAS_AVXVNNI
#define NAME(x) x##_avxvnni
#define TARGET __attribute__((target("avx2,avxvnni")))
#define DOT(s, w, x) _mm256_dpwssd_avx_epi32(s, w, x)
#include "int4_avx2.h"
#include "int4_tile.h"
#endif

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))
#define LANES 16
#define V __m512i
#define W __m512i
#define N4 __m512i
#define ZERO() _mm512_setzero_si512()
#define LOAD_NIBBLES(p) _mm512_loadu_si512(p)
#define NIBBLES(v, i) _mm512_srai_epi16((i) < 3 ? _mm512_slli_epi16(v, 12 - 4 * (i)) : (v), 12)
#define LOAD_BYTES(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_W(p) _mm512_loadu_si512(p)
#define STORE_W(p, w) _mm512_storeu_si512(p, w)
#define LOAD_X(p) _mm512_set1_epi32(load_pair(p))
#define DOT(s, w, x) _mm512_dpwssd_epi32(s, w, x)
#define STORE_V(p, s) _mm512_storeu_si512(p, s)
#define F __m512
#define LOAD_F(p) _mm512_loadu_ps(p)
#define ADD_SCALED(p, s, f)                                                                       \
    _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), _mm512_mul_ps(_mm512_cvtepi32_ps(s), f)))
#define FOUR(f) f(0) f(1) f(2) f(3)
#define KEEP(a, b) __asm__ volatile("" : "+v"(a), "+v"(b)::"memory")
#include "int4_tile.h"

#endif

static const set_t SETS[] = {
    [PORTABLE] = SET(portable, 8),
#ifdef __x86_64__
    [AVX2] = SET(avx2, 8),
#if HAS_AVXVNNI
    [AVXVNNI] = SET(avxvnni, 8),
#endif
    [AVX512VNNI] = SET(avx512, 16),
#endif
};

/* ---- packing ---- */

/* int8 [N, K] within [-8, 7], rows `stride` apart, into nibbles, channels from `first` on; K is a
   multiple of 8. */
void shardrun_pack_int4(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, uint32_t *packed, int64_t first) {
    uint16_t pairs[STEP / 2][BLOCK];
    for (int64_t n = 0, rows; n < N; n += rows) {
        int64_t from = (first + n) % BLOCK;
        rows = N - n < BLOCK - from ? N - n : BLOCK - from;
        uint32_t *to = packed + (first + n - from) * (K / 8);
        touch_pages(to, 4 * BLOCK * (K / 8));
        for (int64_t k = 0; k < K; k += STEP) {
            int64_t columns = K - k < STEP ? K - k : STEP;
            shardrun_pack_pairs(src + n * stride + k, stride, rows, columns, (int8_t *)pairs, from);
            for (int64_t at = 0; at < columns / 2; at += 4, to += BLOCK)
                for (int64_t c = from; c < from + rows; c++) {
                    uint32_t word = 0;
                    for (int i = 0; i < 4; i++) {
                        uint32_t pair = pairs[at + i][c]; /* the even column is the low byte */
                        word |= ((pair & 0xf) | (pair & 0xf00) << 8) << (4 * i);
                    }
                    to[c] = word;
                }
        }
    }
}

/* Nibbles 0 to 7 of a word, or of each of four, as 0 2 4 6 1 3 5 7: twice, what lies in the middle
   changes places. */
typedef uint32_t v4u __attribute__((vector_size(16)));
#define EVEN_FIRST(type)                                                                          \
    INLINE type even_first_##type(type x) {                                                       \
        type t = (x ^ (x >> 4)) & 0x00f000f0u;                                                    \
        x ^= t ^ (t << 4);                                                                        \
        t = (x ^ (x >> 8)) & 0x0000ff00u;                                                         \
        return x ^ t ^ (t << 8);                                                                  \
    }
EVEN_FIRST(uint32_t)
EVEN_FIRST(v4u)

/* Words of 4 rows into to[k][row], as far as whole registers go; returns how many. */
static int64_t transpose_4_rows(const uint8_t *src, int64_t stride, int64_t words, uint32_t *to) {
    int64_t k = 0;
#ifdef __x86_64__
    for (; k + 4 <= words; k += 4) {
        __m128i a[4], b[4];
        for (int n = 0; n < 4; n++) {
            v4u x;
            memcpy(&x, src + n * stride + 4 * k, sizeof x);
            a[n] = (__m128i)even_first_v4u(x);
        }
        for (int h = 0; h < 2; h++) {
            b[2 * h] = _mm_unpacklo_epi32(a[2 * h], a[2 * h + 1]);
            b[2 * h + 1] = _mm_unpackhi_epi32(a[2 * h], a[2 * h + 1]);
        }
        for (int h = 0; h < 2; h++) {
            uint32_t *at = to + BLOCK * (k + 2 * h);
            _mm_storeu_si128((__m128i *)at, _mm_unpacklo_epi64(b[h], b[2 + h]));
            _mm_storeu_si128((__m128i *)(at + BLOCK), _mm_unpackhi_epi64(b[h], b[2 + h]));
        }
    }
#endif
    return k;
}

/* The same from nibbles as they are stored, the even column of a byte below the odd one; `stride`
   bytes from row to row. */
void shardrun_pack_nibbles(
    const uint8_t *src, int64_t stride, int64_t N, int64_t K, uint32_t *packed, int64_t first) {
    for (int64_t n = 0, done = 0; n < N; n++) {
        int64_t at = (first + n) % BLOCK;
        const uint8_t *row = src + n * stride;
        uint32_t *block = packed + (first + n - at) * (K / 8);
        if (n == 0 || at == 0) touch_pages(block, 4 * BLOCK * (K / 8));
        if (n == 0 || at % 4 == 0)
            done = at % 4 == 0 && n + 4 <= N ? transpose_4_rows(row, stride, K / 8, block + at) : 0;
        for (int64_t k = done; k < K / 8; k++) {
            uint32_t word = row[4 * k] | row[4 * k + 1] << 8 | row[4 * k + 2] << 16 |
                            (uint32_t)row[4 * k + 3] << 24;
            block[BLOCK * k + at] = even_first_uint32_t(word);
        }
    }
}

/* ---- the product ---- */

/* The product's arguments; those not named here are as in int8.c's.

   packed: as above, of K columns and the `before` that the first eight have before them; bits: 4 or 8.
   group_size: a multiple of 8 that is at most STEP, or 0 where a row has one scale. first: the place of
   the first packed column in its group. scales: [N / 32][groups][32] of scales_type, or NULL.
   scale: [N], or NULL where there are scales. bare: the sums are stored as they are, FLOAT32 where
   there are groups, else INT32 or INT64. work: room for M floats and, behind them, M * planes rows of
   int16, ROW for each step that the columns take from the beginning of the first group. */
typedef struct {
    int64_t set;
    const void *x;
    int64_t x_type, x_stride;
    const float *amax;
    int64_t M, K, levels;
    const uint8_t *packed;
    int64_t bits, N, before, group_size, first;
    const void *scales;
    int64_t scales_type;
    const float *scale;
    const void *bias;
    int64_t bias_type;
    void *out;
    int64_t out_type, bare;
    void *work;
} int4_t;

typedef struct {
    const int4_t *a;
    const set_t *set;
    int64_t columns, num_planes, num_groups; /* columns: a multiple of 8 */
    const int16_t *q;                        /* [steps][M][planes][ROW] */
    const float *row_scale;                  /* [M] */
    epilogue_t end;
} product_t;

/* The sums of a block and a panel of rows. */
typedef union {
    float scaled[PANEL * BLOCK];
    int64_t whole[PANEL * BLOCK];
} totals_t;

static int64_t column_bytes(const int4_t *a) { return BLOCK * a->bits / 8; }

/* Of an activation, its column counted from the beginning of the first one's group. */
static int64_t place_of(const product_t *p, int64_t m, int64_t plane, int64_t k) {
    return ((k / STEP * p->a->M + m) * p->num_planes + plane) * ROW + k % STEP;
}

/* Rows of a tile: no row's planes apart, and 8 rows are two tiles of 4, not 6 and 2. */
static int64_t tile_rows(int64_t left, int64_t num_planes) {
    int64_t most = ROWS / num_planes;
    return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

static int64_t count_tiles(int64_t rows, int64_t num_planes) {
    int64_t most = ROWS / num_planes;
    return (rows + most - 1) / most;
}

/* What the tiles have stored instead of adding it up. */
static void add_sums(
    const product_t *p, int64_t rows, const int32_t *sums, const float *scale, totals_t *totals) {
    for (int64_t m = 0; m < rows; m++, sums += p->num_planes * BLOCK)
        if (scale) p->set->add_planes(sums, scale, totals->scaled + m * BLOCK);
        else p->set->add_step(sums, p->num_planes, totals->whole + m * BLOCK);
}

/* Some columns of a block times some rows: t says all but the rows.
   wide: room for the columns of a part, where there are several tiles. */
static void multiply_step(
    const product_t *p, tile_t *t, int64_t rows, const float *scale, totals_t *totals, int16_t *wide) {
    const int4_t *a = p->a;
    int32_t sums[2 * PANEL * BLOCK];
    int64_t num_planes = p->num_planes, num_tiles = count_tiles(rows, num_planes);
    int is_row = a->bits == 4 && rows * num_planes == 1;
    int64_t num_parts = is_row ? 1 : p->set->num_parts;
    const int16_t *q = t->x;
    const void *w = t->w;
    t->wide = wide;
    /* Each tile fetches its share of the weights that come next, so that memory never waits. */
    t->ahead = (const uint8_t *)w + t->num_columns * column_bytes(a);
    t->ahead_step = 8 * column_bytes(a) / (num_tiles * num_parts);
    int64_t nibbles = is_row ? NIBBLES_ROW : num_tiles > 1 ? NIBBLES_KEPT : NIBBLES_ONCE;
    for (t->part = 0; t->part < num_parts; t->part++) {
        t->w = w;
        t->source = a->bits == 8 ? BYTES : nibbles;
        for (int64_t m = 0, count; m < rows; m += count) {
            count = tile_rows(rows - m, num_planes);
            t->x = q + m * num_planes * ROW;
            t->rows = count * num_planes;
            t->out = totals->scaled + m * BLOCK;
            t->sums = sums + m * num_planes * BLOCK;
            p->set->tile(t);
            t->ahead += t->num_columns / 8 * t->ahead_step;
            if (t->source == NIBBLES_KEPT) t->source = WIDE, t->w = wide;
        }
    }
    if (!t->scale) add_sums(p, rows, sums, scale, totals);
}

static void finish(const product_t *p, int64_t m, int64_t n0, totals_t *totals, int64_t at) {
    const int4_t *a = p->a;
    int64_t count = a->N - n0 < BLOCK ? a->N - n0 : BLOCK;
    if (a->bare && !a->scales) {
        store_sums(&p->end, m * a->N + n0, count, totals->whole + at * BLOCK);
        return;
    }
    float values[BLOCK];
    for (int64_t n = 0; n < count; n++)
        values[n] = a->scales ? totals->scaled[at * BLOCK + n] : (float)totals->whole[at * BLOCK + n];
    if (a->bare) memcpy((float *)a->out + m * a->N + n0, values, count * sizeof *values);
    else scale_sums(&p->end, m, n0, count, values, p->row_scale[m]);
}

/* The scales of the groups that columns [k, end) of a block touch, and where these groups end. */
static void enter_groups(const product_t *p, int64_t block, int64_t k, tile_t *t, float *scale) {
    const int4_t *a = p->a;
    int64_t size = a->group_size, group = (a->first + k) / size, inside = (a->first + k) % size;
    int64_t count = (inside + t->num_columns + size - 1) / size;
    p->set->widen_scales(
        a->scales, a->scales_type, (block * p->num_groups + group) * BLOCK, count * BLOCK, scale);
    if (size - inside < t->num_columns) t->first_group = size - inside;
    t->group = size;
}

/* One block of channels times some rows. */
static void multiply(const product_t *p, int64_t block, int64_t m0, int64_t rows) {
    const int4_t *a = p->a;
    totals_t totals;
    float scale[(STEP / 8 + 1) * BLOCK];
    int16_t wide[STEP * BLOCK] __attribute__((aligned(64)));
    /* Sums in two planes are joined before they are scaled, so there each group is a step. */
    int64_t adds = a->scales && p->num_planes == 1, size = a->scales && !adds ? a->group_size : STEP;
    if (a->scales)
        for (int64_t i = 0; i < rows * BLOCK; i++) totals.scaled[i] = -0.0f; /* + x is x, always */
    else memset(totals.whole, 0, rows * BLOCK * sizeof *totals.whole);
    for (int64_t k = 0, end; k < p->columns; k = end) {
        end = k + size - (a->first + k) % size;
        if (end > p->columns) end = p->columns;
        tile_t t = {
            .w = a->packed + (block * p->columns + k) * column_bytes(a),
            .x = p->q + place_of(p, m0, 0, a->first + k),
            .num_columns = end - k, .first_group = end - k, .scale = adds ? scale : 0};
        if (a->scales) enter_groups(p, block, k, &t, scale);
        multiply_step(p, &t, rows, a->scales ? scale : 0, &totals, wide);
    }
    for (int64_t m = 0; m < rows; m++) finish(p, m0 + m, block * BLOCK, &totals, m);
}

/* Row m as integers, with zeros around them; returns its scale. */
static float place_row(const product_t *p, row_functions_t f, int16_t *q, int64_t m) {
    const int4_t *a = p->a;
    int64_t size = a->x_type == FLOAT32 ? 4 : 2, begin = a->first + a->before, end = begin + a->K;
    const char *x = (const char *)a->x + m * a->x_stride * size;
    float amax = a->amax ? a->amax[m] : f.amax(x, a->K);
    for (int64_t plane = 0; plane < p->num_planes; plane++) {
        memset(q + place_of(p, m, plane, a->first), 0, 16);
        memset(q + place_of(p, m, plane, a->first + p->columns - 8), 0, 16);
    }
    for (int64_t k = begin, next; k < end; k = next) {
        next = k + STEP - k % STEP < end ? k + STEP - k % STEP : end;
        round_row(
            f, x + (k - begin) * size, next - k, amax, (float)a->levels, q + place_of(p, m, 0, k),
            p->num_planes == 2 ? q + place_of(p, m, 1, k) : 0);
    }
    return row_scale_of(amax, (float)a->levels);
}

/* out = x @ W.T * scale + bias. */
int shardrun_int4(const int4_t *a) {
    int64_t num_planes = a->levels > 32767 ? 2 : 1, columns = (a->before + a->K + 7) / 8 * 8;
    int64_t num_groups = a->scales ? (a->first + columns + a->group_size - 1) / a->group_size : 0;
    float *row_scale = a->work;
    int16_t *q = (int16_t *)(row_scale + a->M);
    product_t p = {a, &SETS[a->set], columns, num_planes, num_groups, q, row_scale,
                   {a->scale, a->bias, a->bias_type, a->out, a->out_type, a->N}};
    row_functions_t f = row_functions(a->set, a->x_type);
    int64_t num_blocks = (a->N + BLOCK - 1) / BLOCK;
    int64_t at_once = round_rows(a->M), num_rounds = (a->M + at_once - 1) / at_once;
#pragma omp parallel if (a->N * a->K * a->M > 65536)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < a->M; m++) row_scale[m] = place_row(&p, f, q, m);
/* A core that others use too takes fewer blocks. */
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < num_rounds * num_blocks; i++) {
            int64_t first = i / num_blocks * at_once, end = a->M - first < at_once ? a->M : first + at_once;
            for (int64_t m = first; m < end; m += PANEL)
                multiply(&p, i % num_blocks, m, end - m < PANEL ? end - m : PANEL);
        }
    }
    return 0;
}
