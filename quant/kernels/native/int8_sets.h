/* The instruction sets that int8.c is compiled for, and the tiles of each: pairs of columns of 16 bits,
   and quads of 8 bits where one instruction multiplies those and does not saturate (VNNI; AVX2's
   vpmaddubsw does). The portable set, any little-endian processor's, has both, so that all can test
   quads. */

#ifndef SHARDRUN_INT8_SETS_H
#define SHARDRUN_INT8_SETS_H

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "epilogue.h"
#include "vector_types.h"

#define WORD 4     /* bytes of activations that are multiplied at once: a pair of 16 bits, a quad of 8 */
#define PAIR 2
#define QUAD 4
#define ROWS 6     /* most rows of a tile: 12 sums, 2 weights, an activation, a product: 16 registers */
#define CHUNK 512  /* columns whose sum fits int32: 512 * 32258 * 128 < 2^31; 16 KB of weights */
#define AHEAD 2048 /* bytes of weights that one row's product fetches ahead */

/* The weights of some columns of a block, `num_words` words of each channel; as many of each row's
   activations, rows x_stride bytes apart; the sums [rows][BLOCK] that are added to; weights to fetch
   meanwhile, as many as these. */
typedef void (*block_t)(
    const int8_t *, const char *, int64_t, int64_t, int64_t, int64_t *, const int8_t *);

static inline int32_t load_word(const char *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* ---- portable ---- */

INLINE pairs_t repeat_pair(const char *p) {
    int16_t pair[2];
    memcpy(pair, p, sizeof pair);
    return (pairs_t){(v8i){} + pair[0], (v8i){} + pair[1]};
}
typedef struct { v8i column[QUAD]; } quads_t;
INLINE quads_t load_quads(const int8_t *p) {
    v8i words;
    quads_t w;
    memcpy(&words, p, sizeof words);
    for (int i = 0; i < QUAD; i++) w.column[i] = words << (24 - 8 * i) >> 24;
    return w;
}
INLINE quads_t repeat_quad(const char *p) {
    quads_t x;
    for (int i = 0; i < QUAD; i++) x.column[i] = (v8i){} + (uint8_t)p[i];
    return x;
}
INLINE v8i dot_quads(v8i s, quads_t w, quads_t x) {
    for (int i = 0; i < QUAD; i++) s += w.column[i] * x.column[i];
    return s;
}
INLINE void add_lanes(int64_t *p, v8i sums) {
    for (int i = 0; i < 8; i++) p[i] += sums[i];
}
static int works_portable(void) { return 1; }

#define TARGET
#define LANES 8
#define V v8i
#define ZERO() ((v8i){})
#define ADD_TO(p, s) add_lanes(p, s)
#define KEEP(a, b)

#define NAME(x) x##_pairs_portable
#define WIDTH PAIR
#define W pairs_t
#define LOAD_W(p) load_byte_pairs(p)
#define LOAD_X(p) repeat_pair(p)
#define DOT(s, w, x) ((s) + (w).even * (x).even + (w).odd * (x).odd)
#include "tile.h"

#define NAME(x) x##_quads_portable
#define WIDTH QUAD
#define W quads_t
#define LOAD_W(p) load_quads(p)
#define LOAD_X(p) repeat_quad(p)
#define DOT(s, w, x) dot_quads(s, w, x)
#include "tile.h"
#include "end_tile.h"

#ifdef __x86_64__

/* ---- AVX2 ---- */

__attribute__((target("avx2"))) static inline void add_lanes_avx2(int64_t *p, __m256i sums) {
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sums));
    __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sums, 1));
    __m256i *q = (__m256i *)p;
    _mm256_storeu_si256(q, _mm256_add_epi64(_mm256_loadu_si256(q), low));
    _mm256_storeu_si256(q + 1, _mm256_add_epi64(_mm256_loadu_si256(q + 1), high));
}
static int works_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#define LANES 8
#define V __m256i
#define ZERO() _mm256_setzero_si256()
#define ADD_TO(p, s) add_lanes_avx2(p, s)
#define KEEP(a, b) __asm__ volatile("" : "+x"(a), "+x"(b)::"memory")

#define TARGET __attribute__((target("avx2")))
#define NAME(x) x##_pairs_avx2
#define WIDTH PAIR
#define W __m256i
#define LOAD_W(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_X(p) _mm256_set1_epi32(load_word(p))
#define DOT(s, w, x) _mm256_add_epi32(s, _mm256_madd_epi16(w, x))
#include "tile.h"
#undef TARGET

/* ---- AVX-VNNI: the same registers, one instruction for two; no AVX-512 ---- */

#if HAS_AVXVNNI
static int works_avxvnni(void) {
    unsigned a, b, c, d;
    return works_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

#define TARGET __attribute__((target("avx2,avxvnni")))
#define NAME(x) x##_pairs_avxvnni
#define WIDTH PAIR
#define W __m256i
#define LOAD_W(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_X(p) _mm256_set1_epi32(load_word(p))
#define DOT(s, w, x) _mm256_dpwssd_avx_epi32(s, w, x)
#include "tile.h"

#define NAME(x) x##_quads_avxvnni
#define WIDTH QUAD
#define W __m256i
#define LOAD_W(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_X(p) _mm256_set1_epi32(load_word(p))
#define DOT(s, w, x) _mm256_dpbusd_avx_epi32(s, x, w)
#include "tile.h"
#undef TARGET
#else
static int works_avxvnni(void) { return 0; }
#define block_pairs_avxvnni 0
#define block_quads_avxvnni 0
#endif
#include "end_tile.h"

/* ---- AVX-512 with VNNI ---- */

#define TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))
TARGET static inline void add_lanes_avx512(int64_t *p, __m512i sums) {
    add_lanes_avx2(p, _mm512_castsi512_si256(sums));
    add_lanes_avx2(p + 8, _mm512_extracti64x4_epi64(sums, 1));
}
static int works_avx512vnni(void) {
    return works_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#define LANES 16
#define V __m512i
#define ZERO() _mm512_setzero_si512()
#define ADD_TO(p, s) add_lanes_avx512(p, s)
#define KEEP(a, b) __asm__ volatile("" : "+v"(a), "+v"(b)::"memory")

#define NAME(x) x##_pairs_avx512vnni
#define WIDTH PAIR
#define W __m512i
#define LOAD_W(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_X(p) _mm512_set1_epi32(load_word(p))
#define DOT(s, w, x) _mm512_dpwssd_epi32(s, w, x)
#include "tile.h"

#define NAME(x) x##_quads_avx512vnni
#define WIDTH QUAD
#define W __m512i
#define LOAD_W(p) _mm512_loadu_si512((const void *)(p))
#define LOAD_X(p) _mm512_set1_epi32(load_word(p))
#define DOT(s, w, x) _mm512_dpbusd_epi32(s, x, w)
#include "tile.h"
#include "end_tile.h"

#endif

/* ---- all of them ---- */

static const struct {
    const char *name;
    int (*works)(void);
    block_t pairs, quads; /* quads: NULL where no instruction multiplies them */
} SETS[] = {
    [PORTABLE] = {"portable", works_portable, block_pairs_portable, block_quads_portable},
#ifdef __x86_64__
    [AVX2] = {"avx2", works_avx2, block_pairs_avx2, 0},
    [AVXVNNI] = {"avxvnni", works_avxvnni, block_pairs_avxvnni, block_quads_avxvnni},
    [AVX512VNNI] = {"avx512vnni", works_avx512vnni, block_pairs_avx512vnni, block_quads_avx512vnni},
#endif
};
#define NUM_SETS ((int)(sizeof SETS / sizeof SETS[0]))

#endif
