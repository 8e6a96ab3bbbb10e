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

#define INLINE static inline __attribute__((always_inline))

#define TARGET_portable
INLINE v8f widened_portable(const uint16_t *p) {
    v8h bits;
    memcpy(&bits, p, sizeof bits);
    return (v8f)(__builtin_convertvector(bits, v8u) << 16);
}
INLINE v8f multiply_add_portable(v8f sum, v8f a, v8f b) { return sum + a * b; }

#ifdef __x86_64__
#define TARGET_avx2 __attribute__((target("avx2,fma")))
TARGET_avx2 INLINE v8f widened_avx2(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (v8f)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TARGET_avx2 INLINE v8f multiply_add_avx2(v8f sum, v8f a, v8f b) {
    return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
#endif

#endif
