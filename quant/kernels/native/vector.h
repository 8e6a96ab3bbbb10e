/* Eight numbers at a time, for one instruction set. Included by what is built on it, once for each
   set, after the macro SET (portable, avx2) was defined; end_vector.h takes the macros back. */

#include "vector_types.h"

#define PASTE_(name, set) name##_##set
#define PASTE(name, set) PASTE_(name, set)
#define NAME(name) PASTE(name, SET)
#define TARGET PASTE(TARGET, SET)
#define MULTIPLY_ADD(sum, a, b) NAME(multiply_add)(sum, a, b)

/* Eight numbers as float32. */
TARGET INLINE v8f NAME(load8)(const void *p, int type, int64_t at) {
    if (type == FLOAT32) {
        v8f value;
        memcpy(&value, (const float *)p + at, sizeof value);
        return value;
    }
    return NAME(widened)((const uint16_t *)p + at);
}

/* to_bfloat16 of each of eight numbers. */
TARGET INLINE v8u NAME(bfloat16_bits)(v8f value) {
    v8u bits = (v8u)value, is_nan = (v8u)(value != value);
    v8u rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (rounded & ~is_nan) | ((bits >> 16 | 64) & is_nan);
}

/* Eight numbers rounded to `type`. */
TARGET INLINE void NAME(store8)(void *p, int type, int64_t at, v8f value) {
    if (type == FLOAT32) {
        memcpy((float *)p + at, &value, sizeof value);
        return;
    }
    v8h halves = __builtin_convertvector(NAME(bfloat16_bits)(value), v8h);
    memcpy((uint16_t *)p + at, &halves, sizeof halves);
}

/* Eight numbers as if they had been stored and loaded. */
TARGET INLINE v8f NAME(round8)(v8f value, int type) {
    return type == FLOAT32 ? value : (v8f)(NAME(bfloat16_bits)(value) << 16);
}

TARGET INLINE float NAME(sum8)(v8f s) {
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* exp(x) for x <= 0: 2^n times a polynomial of the rest (Cephes), within 2 units of the last place. */
TARGET INLINE v8f NAME(exp8)(v8f x) {
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    v8i is_zero = x < -87.0f; /* not so a NaN, which stays one */
    x = (v8f)((v8i)x & ~is_zero);
    v8f n = (x * 1.44269504088896341f + magic) - magic;
    v8f r = MULTIPLY_ADD(x, n, (v8f){} - 0.693359375f);
    r = MULTIPLY_ADD(r, n, (v8f){} + 2.12194440e-4f);
    v8f y = (v8f){} + 1.9875691500e-4f;
    y = MULTIPLY_ADD((v8f){} + 1.3981999507e-3f, y, r);
    y = MULTIPLY_ADD((v8f){} + 8.3334519073e-3f, y, r);
    y = MULTIPLY_ADD((v8f){} + 4.1665795894e-2f, y, r);
    y = MULTIPLY_ADD((v8f){} + 1.6666665459e-1f, y, r);
    y = MULTIPLY_ADD((v8f){} + 5.0000001201e-1f, y, r);
    y = MULTIPLY_ADD(r + 1.0f, y, r * r);
    return (v8f)((v8i)(y * (v8f)((__builtin_convertvector(n, v8i) + 127) << 23)) & ~is_zero);
}
