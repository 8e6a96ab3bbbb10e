/* What the C files share: instruction sets, the types of tensors, and bfloat16. */

#ifndef SHARDRUN_TYPES_H
#define SHARDRUN_TYPES_H

#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, INT32 = 2, INT64 = 3, INT8 = 4, FLOAT16 = 5 };

/* The instruction sets of products, narrowest first; what is not a product has two forms, portable and
   AVX2 with FMA, which all above it have. */
enum { PORTABLE, AVX2, AVXVNNI, AVX512VNNI };

/* Whether the compiler knows of it: clang calls itself GNU C 4, Apple numbers its own. */
#ifdef __apple_build_version__
#define HAS_AVXVNNI (__clang_major__ >= 13)
#else
#define HAS_AVXVNNI (__GNUC__ >= 11 || __clang_major__ >= 12)
#endif

#define SMALL 4096 /* elements that are not worth a second thread where each is touched once */

static inline float widen_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* a NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* ties to even */
}

static inline float widen(const void *x, int type, int64_t i) {
    return type == FLOAT32 ? ((const float *)x)[i] : widen_bfloat16(((const uint16_t *)x)[i]);
}

#endif
