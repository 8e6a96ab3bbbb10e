/* int8 keys and values, for one instruction set: how they are read by attention, and written.

   The integers become floats in registers only. A byte of -128 is none of them: it stands for what
   was not finite, where no scale of its token can say so (`marks`), and reads as NaN. */

TARGET INLINE v8f NAME(load_int8)(const int8_t *p, int marks) {
    v8f x = NAME(from_bytes)(p);
    return marks ? (v8f)((v8i)x | (x == -128.0f)) : x;
}

/* scores[p] = q . keys[p], eight positions at a time; a multiple of 8 scores is written. */
TARGET INLINE void NAME(score_int8)(
    const float *q, const int8_t *keys, int64_t C, int64_t count, int marks, float *scores) {
    for (int64_t p = 0; p < count; p += 8) {
        const int8_t *rows[8];
        v8f sums[8] = {};
        for (int i = 0; i < 8; i++) rows[i] = keys + (p + i < count ? p + i : count - 1) * C;
        for (int64_t c = 0; c < C; c += 8) {
            v8f x;
            memcpy(&x, q + c, sizeof x);
            for (int i = 0; i < 8; i++)
                sums[i] = MULTIPLY_ADD(sums[i], NAME(load_int8)(rows[i] + c, marks), x);
        }
        v8f found = NAME(sum_each)(sums);
        memcpy(scores + p, &found, sizeof found);
    }
}

/* sums = shrink * sums + weights . values, of 8 * num channels: as many sums as stay in registers. */
TARGET INLINE void NAME(weigh_channels)(
    const float *weights, const int8_t *values, int64_t C, int64_t count, int marks, float shrink,
    int num, float *sums) {
    v8f parts[8];
    for (int i = 0; i < num; i++) {
        memcpy(&parts[i], sums + 8 * i, sizeof parts[i]);
        parts[i] *= shrink;
    }
    for (int64_t p = 0; p < count; p++) {
        v8f weight = (v8f){} + weights[p];
        for (int i = 0; i < num; i++)
            parts[i] =
                MULTIPLY_ADD(parts[i], NAME(load_int8)(values + p * C + 8 * i, marks), weight);
    }
    for (int i = 0; i < num; i++) memcpy(sums + 8 * i, &parts[i], sizeof parts[i]);
}

/* sums[c] = shrink * sums[c] + weights . values[:, c]. */
TARGET INLINE void NAME(weigh_int8)(
    const float *weights, const int8_t *values, int64_t C, int64_t count, int marks, float shrink,
    float *sums) {
    int64_t c = 0;
    for (; c + 64 <= C; c += 64)
        NAME(weigh_channels)(weights, values + c, C, count, marks, shrink, 8, sums + c);
    for (; c < C; c += 16)
        NAME(weigh_channels)(weights, values + c, C, count, marks, shrink, 2, sums + c);
}

/* At most eight positions as floats, for several query heads to share; they stay in L1. */
TARGET INLINE void NAME(widen_rows)(
    const int8_t *rows, int64_t C, int64_t count, int marks, float *tile) {
    for (int64_t i = 0; i < count * C; i += 8) {
        v8f x = NAME(load_int8)(rows + i, marks);
        memcpy(tile + i, &x, sizeof x);
    }
}

/* The scores of a tile, the bits of score_int8's; what lies beyond its rows gives scores of nothing. */
TARGET INLINE void NAME(score_tile)(
    const float *q, const float *tile, int64_t C, float *scores) {
    v8f sums[8] = {};
    for (int64_t c = 0; c < C; c += 8) {
        v8f x, key;
        memcpy(&x, q + c, sizeof x);
        for (int i = 0; i < 8; i++) {
            memcpy(&key, tile + i * C + c, sizeof key);
            sums[i] = MULTIPLY_ADD(sums[i], key, x);
        }
    }
    v8f found = NAME(sum_each)(sums);
    memcpy(scores, &found, sizeof found);
}

/* sums += weights . tile, of 8 * num channels. */
TARGET INLINE void NAME(weigh_tile_channels)(
    const float *weights, const float *tile, int64_t C, int64_t count, int num, float *sums) {
    v8f parts[8], value;
    for (int i = 0; i < num; i++) memcpy(&parts[i], sums + 8 * i, sizeof parts[i]);
    for (int64_t p = 0; p < count; p++) {
        v8f weight = (v8f){} + weights[p];
        for (int i = 0; i < num; i++) {
            memcpy(&value, tile + p * C + 8 * i, sizeof value);
            parts[i] = MULTIPLY_ADD(parts[i], value, weight);
        }
    }
    for (int i = 0; i < num; i++) memcpy(sums + 8 * i, &parts[i], sizeof parts[i]);
}

/* sums[c] += weights . tile[:, c], the bits of weigh_int8's after its shrinking. */
TARGET INLINE void NAME(weigh_tile)(
    const float *weights, const float *tile, int64_t C, int64_t count, float *sums) {
    int64_t c = 0;
    for (; c + 64 <= C; c += 64)
        NAME(weigh_tile_channels)(weights, tile + c, C, count, 8, sums + c);
    for (; c < C; c += 16) NAME(weigh_tile_channels)(weights, tile + c, C, count, 2, sums + c);
}

/* The largest absolute value of a row; NaN where it holds one: its bits are the largest. */
TARGET INLINE float NAME(row_most)(const void *x, int type, int64_t at, int64_t C) {
    v8i most = {};
    for (int64_t c = 0; c < C; c += 8) {
        v8i bits = (v8i)NAME(load8)(x, type, at + c) & INT32_MAX;
        v8i is_more = bits > most;
        most = (bits & is_more) | (most & ~is_more);
    }
    int32_t found = 0;
    for (int i = 0; i < 8; i++) found = most[i] > found ? most[i] : found;
    float value;
    memcpy(&value, &found, sizeof value);
    return value;
}

/* Eight integers within [-127, 127], rounded to the nearest, ties to even; -128 for what is not a
   finite number, or has no finite scale. */
TARGET INLINE void NAME(store_int8)(v8f x, v8f scale, int8_t *to) {
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    v8f n = x / scale;
    v8i is_bad = ((x - x) != 0.0f) | (n != n), is_high = n > 127.0f, is_low = n < -127.0f;
    n = (v8f)(((v8i)n & ~(is_high | is_low)) | ((v8i)((v8f){} + 127.0f) & is_high) |
              ((v8i)((v8f){} - 127.0f) & is_low));
    n = (n + magic) - magic;
    n = (v8f)(((v8i)n & ~is_bad) | ((v8i)((v8f){} - 128.0f) & is_bad));
    v8b bytes = __builtin_convertvector(__builtin_convertvector(n, v8i), v8b);
    memcpy(to, &bytes, sizeof bytes);
}

/* One head of one token: with the scales given, or with one of its own, which is returned. */
TARGET static float NAME(write_head)(
    const void *x, int type, int64_t at, int64_t C, const float *channel_scale, int8_t *to) {
    float scale = 0;
    if (!channel_scale) {
        float most = NAME(row_most)(x, type, at, C);
        scale = most / 127.0f + (most - most); /* an infinity becomes NaN, with its whole row */
        if (scale < FLT_MIN) scale = FLT_MIN;
    }
    v8f scales = (v8f){} + scale;
    for (int64_t c = 0; c < C; c += 8) {
        if (channel_scale) memcpy(&scales, channel_scale + c, sizeof scales);
        NAME(store_int8)(NAME(load8)(x, type, at + c), scales, to + c);
    }
    return scale;
}
