/* What lies between the products of a layer, for one instruction set; see vector.h. */

#include "vector.h"

/* x += delta where there is one; out = weight * (x / rms(x)). Rounded where torch would round. */
TARGET static void NAME(norm_row)(
    void *x, const void *delta, const void *weight, int type, int64_t at, int64_t D, float eps,
    void *out) {
    v8f squares = {};
    for (int64_t d = 0; d < D; d += 8) {
        v8f value = NAME(load8)(x, type, at + d);
        if (delta) {
            value = NAME(round8)(value + NAME(load8)(delta, type, at + d), type);
            NAME(store8)(x, type, at + d, value);
        }
        squares = MULTIPLY_ADD(squares, value, value);
    }
    v8f scale = (v8f){} + 1.0f / sqrtf(NAME(sum8)(squares) / (float)D + eps);
    for (int64_t d = 0; d < D; d += 8) {
        v8f value = NAME(round8)(NAME(load8)(x, type, at + d) * scale, type);
        NAME(store8)(out, type, at + d, NAME(load8)(weight, type, d) * value);
    }
}

/* out = silu(gate) * up. */
TARGET static void NAME(silu_row)(
    const void *gate_up, int type, int64_t gate, int64_t up, int64_t F, void *out, int64_t to) {
    for (int64_t f = 0; f < F; f += 8) {
        v8f x = NAME(load8)(gate_up, type, gate + f);
        v8i is_negative = x < 0;
        v8f e = NAME(exp8)((v8f)((v8i)x | INT32_MIN)); /* exp(-|x|), which cannot overflow */
        v8f numerator = (v8f)(((v8i)(x * e) & is_negative) | ((v8i)x & ~is_negative));
        v8f silu = NAME(round8)(numerator / (e + 1.0f), type);
        NAME(store8)(out, type, to + f, silu * NAME(load8)(gate_up, type, up + f));
    }
}

/* Turns one head in place: pairs of a dimension of the first half and one of the second. */
TARGET static void NAME(rotate_head)(
    void *x, int type, int64_t at, int64_t C, const void *cos, const void *sin, int64_t angle) {
    for (int64_t c = 0; c < C / 2; c += 8) {
        int64_t half = C / 2;
        v8f first = NAME(load8)(x, type, at + c), second = NAME(load8)(x, type, at + half + c);
        v8f a = NAME(round8)(first * NAME(load8)(cos, type, angle + c), type);
        v8f b = NAME(round8)(second * NAME(load8)(cos, type, angle + half + c), type);
        /* The first half of the sines is negative. */
        a = MULTIPLY_ADD(a, second, NAME(load8)(sin, type, angle + c));
        b = MULTIPLY_ADD(b, first, NAME(load8)(sin, type, angle + half + c));
        NAME(store8)(x, type, at + c, a);
        NAME(store8)(x, type, at + half + c, b);
    }
}

#include "end_vector.h"
