/* Vectors of eight and the little that differs between instruction sets. */

#ifndef SHARDRUN_VECTOR_TYPES_H
#define SHARDRUN_VECTOR_TYPES_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "types.h"

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef int8_t v8b __attribute__((vector_size(8)));
typedef int16_t v8s __attribute__((vector_size(16)));
typedef struct { v8i even, odd; } pairs_t;

#define INLINE static inline __attribute__((always_inline))

/* Eight pairs of bytes; little-endian. */
INLINE pairs_t load_byte_pairs(const void *p) {
    v8s pairs;
    memcpy(&pairs, p, sizeof pairs);
    return (pairs_t){
        __builtin_convertvector(pairs << 8 >> 8, v8i), __builtin_convertvector(pairs >> 8, v8i)};
}

#define TARGET_portable
INLINE v8f widened_portable(const uint16_t *p) {
    v8h bits;
    memcpy(&bits, p, sizeof bits);
    return (v8f)(__builtin_convertvector(bits, v8u) << 16);
}
INLINE v8f multiply_add_portable(v8f sum, v8f a, v8f b) { return sum + a * b; }
INLINE v8f from_bytes_portable(const int8_t *p) {
    v8b bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, v8f);
}
/* The sum of each of eight vectors, added in the order of the other set's. */
INLINE v8f sum_each_portable(const v8f *of) {
    v8f sums;
    for (int i = 0; i < 8; i++) {
        v8f s = of[i];
        sums[i] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    }
    return sums;
}

#ifdef __x86_64__
#define TARGET_avx2 __attribute__((target("avx2,fma")))
TARGET_avx2 INLINE v8f widened_avx2(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (v8f)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TARGET_avx2 INLINE v8f multiply_add_avx2(v8f sum, v8f a, v8f b) {
    return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
TARGET_avx2 INLINE v8f from_bytes_avx2(const int8_t *p) {
    return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
TARGET_avx2 INLINE v8f sum_each_avx2(const v8f *of) {
    __m256 pairs[4], fours[2];
    for (int i = 0; i < 4; i++) pairs[i] = _mm256_hadd_ps((__m256)of[2 * i], (__m256)of[2 * i + 1]);
    for (int i = 0; i < 2; i++) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
    return (v8f)_mm256_add_ps(
        _mm256_permute2f128_ps(fours[0], fours[1], 0x20),
        _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
#endif

/* A function that is compiled for each SET, in the form for instruction set `set`. */
#ifdef __x86_64__
#define CHOOSE(set, name) ((set) > PORTABLE ? name##_avx2 : name##_portable)
#else
#define CHOOSE(set, name) name##_portable
#endif

#endif
