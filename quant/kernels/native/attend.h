/* Decode attention of one kv head, for one instruction set: NAME, TARGET, MULTIPLY_ADD as in
   attention.c. Included once for each. */

/* Eight numbers as float32. */
TARGET INLINE v8f NAME(load8)(const void *p, int type, int64_t at) {
    if (type == FLOAT32) {
        v8f value;
        memcpy(&value, (const float *)p + at, sizeof value);
        return value;
    }
    return WIDENED((const uint16_t *)p + at);
}

/* exp(x) for x <= 0: 2^n times a polynomial of the rest (Cephes), within 2 units of the last place. */
TARGET INLINE v8f NAME(exp8)(v8f x) {
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    for (int i = 0; i < 8; i++) x[i] = x[i] < -87.0f ? -87.0f : x[i]; /* a NaN stays */
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
    return y * (v8f)((__builtin_convertvector(n, v8i) + 127) << 23);
}

/* scores[p] = q . keys[p], for `count` positions; q is scaled already. */
TARGET INLINE void NAME(score)(
    const float *q, const void *keys, int type, int64_t at, int64_t C, int64_t count, float *scores) {
    for (int64_t p = 0; p < count; p++) {
        v8f even = {}, odd = {};
        int64_t row = at + p * C;
        for (int64_t c = 0; c < C; c += 16) {
            v8f left, right;
            memcpy(&left, q + c, sizeof left);
            memcpy(&right, q + c + 8, sizeof right);
            even = MULTIPLY_ADD(even, NAME(load8)(keys, type, row + c), left);
            odd = MULTIPLY_ADD(odd, NAME(load8)(keys, type, row + c + 8), right);
        }
        v8f s = even + odd;
        scores[p] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
}

/* sums[c] = shrink * sums[c] + weights . values[:, c]. */
TARGET INLINE void NAME(weigh)(
    const float *weights, const void *values, int type, int64_t at, int64_t C, int64_t count,
    float shrink, float *sums) {
    for (int64_t c = 0; c < C; c += 16) {
        v8f low, high;
        memcpy(&low, sums + c, sizeof low);
        memcpy(&high, sums + c + 8, sizeof high);
        low *= shrink;
        high *= shrink;
        for (int64_t p = 0; p < count; p++) {
            v8f weight = (v8f){} + weights[p];
            low = MULTIPLY_ADD(low, NAME(load8)(values, type, at + p * C + c), weight);
            high = MULTIPLY_ADD(high, NAME(load8)(values, type, at + p * C + c + 8), weight);
        }
        memcpy(sums + c, &low, sizeof low);
        memcpy(sums + c + 8, &high, sizeof high);
    }
}

/* Turn scores into weights exp(score - most), and return their sum. */
TARGET INLINE float NAME(soften)(float *scores, int64_t count, float most) {
    v8f total = {};
    for (int64_t p = count; p < PIECE; p++) scores[p] = -INFINITY;
    for (int64_t p = 0; p < count; p += 8) {
        v8f x;
        memcpy(&x, scores + p, sizeof x);
        x = NAME(exp8)(x - most);
        for (int64_t i = count - p; i < 8; i++) x[i] = 0;
        memcpy(scores + p, &x, sizeof x);
        total += x;
    }
    return ((total[0] + total[4]) + (total[2] + total[6])) +
           ((total[1] + total[5]) + (total[3] + total[7]));
}

/* Queries [G, C] over `length` positions. The softmax is kept up to date piece by piece (Milakov and
   Gimelshein, 2018): a larger maximum shrinks what was summed before. */
TARGET static void NAME(attend)(
    const float *q, const void *keys, const void *values, int type, int64_t at, int64_t G, int64_t C,
    int64_t length, float *out) {
    float scores[PIECE], most[MAX_GROUP], total[MAX_GROUP];
    for (int64_t g = 0; g < G; g++) most[g] = -INFINITY, total[g] = 0;
    memset(out, 0, G * C * sizeof *out);
    for (int64_t p = 0; p < length; p += PIECE) {
        int64_t count = length - p < PIECE ? length - p : PIECE, here = at + p * C;
        for (int64_t g = 0; g < G; g++) {
            NAME(score)(q + g * C, keys, type, here, C, count, scores);
            float before = most[g];
            for (int64_t i = 0; i < count; i++) most[g] = scores[i] > most[g] ? scores[i] : most[g];
            float shrink = before == -INFINITY ? 0 : expf(before - most[g]);
            total[g] = total[g] * shrink + NAME(soften)(scores, count, most[g]);
            NAME(weigh)(scores, values, type, here, C, count, shrink, out + g * C);
        }
    }
    for (int64_t g = 0; g < G; g++)
        for (int64_t c = 0; c < C; c++) out[g * C + c] /= total[g];
}

#undef NAME
#undef TARGET
#undef WIDENED
#undef MULTIPLY_ADD
