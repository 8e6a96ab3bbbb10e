/* Decode attention of one kv head, for one instruction set; see vector.h. */

#include "vector.h"
#include "int8_cache.h"

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
        scores[p] = NAME(sum8)(even + odd);
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
    return NAME(sum8)(total);
}

/* scores[p] for `count` positions from p on, whatever they are kept as. */
TARGET INLINE void NAME(score_run)(
    const float *q, const run_t *run, int64_t p, int64_t C, int64_t count, float *scores) {
    int64_t at = run->at + p * C;
    if (run->type != INT8) {
        NAME(score)(q, run->keys, run->type, at, C, count, scores);
        return;
    }
    const int8_t *keys = (const int8_t *)run->keys + at;
    if (!run->key_scale) {
        NAME(score_int8)(q, keys, C, count, 1, scores);
        return;
    }
    NAME(score_int8)(q, keys, C, count, 0, scores);
    for (int64_t i = 0; i < count; i++) scores[i] *= run->key_scale[p + i];
}

/* Adds weights . values; overwrites the weights. */
TARGET INLINE void NAME(weigh_run)(
    float *weights, const run_t *run, int64_t p, int64_t C, int64_t count, float shrink,
    float *sums) {
    int64_t at = run->at + p * C;
    if (run->type != INT8) {
        NAME(weigh)(weights, run->values, run->type, at, C, count, shrink, sums);
        return;
    }
    const int8_t *values = (const int8_t *)run->values + at;
    if (!run->value_scale) {
        NAME(weigh_int8)(weights, values, C, count, 1, shrink, sums);
        return;
    }
    for (int64_t i = 0; i < count; i++) weights[i] *= run->value_scale[p + i];
    NAME(weigh_int8)(weights, values, C, count, 0, shrink, sums);
}

/* Turn a piece's scores into weights under the largest score so far, `most`, and add them to `total`.
   Returns what is to be multiplied with all that was summed before: the softmax is kept up to date
   piece by piece (Milakov and Gimelshein, 2018). */
TARGET INLINE float NAME(renew)(float *scores, int64_t count, float *most, float *total) {
    float before = *most;
    for (int64_t i = 0; i < count; i++) *most = scores[i] > *most ? scores[i] : *most;
    float shrink = before == -INFINITY ? 0 : expf(before - *most);
    *total = *total * shrink + NAME(soften)(scores, count, *most);
    return shrink;
}

/* The integers of positions p to p + count become floats once for all query heads, [G, PIECE] scores. */
TARGET INLINE void NAME(score_shared)(
    const float *q, const run_t *run, int64_t p, int64_t G, int64_t C, int64_t count, float *tile,
    float *scores) {
    const int8_t *keys = (const int8_t *)run->keys + run->at + p * C;
    for (int64_t i = 0; i < count; i += 8) {
        int64_t rows = count - i < 8 ? count - i : 8;
        NAME(widen_rows)(keys + i * C, C, rows, !run->key_scale, tile);
        for (int64_t g = 0; g < G; g++)
            NAME(score_tile)(q + g * C, tile, C, scores + g * PIECE + i);
    }
    if (!run->key_scale) return;
    for (int64_t g = 0; g < G; g++)
        for (int64_t i = 0; i < count; i++) scores[g * PIECE + i] *= run->key_scale[p + i];
}

/* The same of values: sums [G, C] take up weights . values; overwrites the weights. */
TARGET INLINE void NAME(weigh_shared)(
    float *weights, const run_t *run, int64_t p, int64_t G, int64_t C, int64_t count, float *tile,
    float *sums) {
    const int8_t *values = (const int8_t *)run->values + run->at + p * C;
    for (int64_t g = 0; g < G && run->value_scale; g++)
        for (int64_t i = 0; i < count; i++) weights[g * PIECE + i] *= run->value_scale[p + i];
    for (int64_t i = 0; i < count; i += 8) {
        int64_t rows = count - i < 8 ? count - i : 8;
        NAME(widen_rows)(values + i * C, C, rows, !run->value_scale, tile);
        for (int64_t g = 0; g < G; g++)
            NAME(weigh_tile)(weights + g * PIECE + i, tile, C, rows, sums + g * C);
    }
}

/* Queries [G, C] over `length` positions. Integers take the same additions whether one head reads them
   or several do: the bits are the same. */
TARGET static void NAME(attend)(
    const float *q, const run_t *run, int64_t G, int64_t C, int64_t length, float *out) {
    float scores[MAX_GROUP * PIECE], most[MAX_GROUP], total[MAX_GROUP];
    float tile[8 * MAX_CHANNELS] = {0};
    int is_shared = run->type == INT8 && G > 1;
    for (int64_t g = 0; g < G; g++) most[g] = -INFINITY, total[g] = 0;
    memset(out, 0, G * C * sizeof *out);
    for (int64_t p = 0; p < length; p += PIECE) {
        int64_t count = length - p < PIECE ? length - p : PIECE;
        if (is_shared) NAME(score_shared)(q, run, p, G, C, count, tile, scores);
        for (int64_t g = 0; g < G; g++) {
            float *own = scores + g * PIECE, *sums = out + g * C;
            if (!is_shared) NAME(score_run)(q + g * C, run, p, C, count, own);
            float shrink = NAME(renew)(own, count, &most[g], &total[g]);
            if (!is_shared) NAME(weigh_run)(own, run, p, C, count, shrink, sums);
            else
                for (int64_t c = 0; c < C; c++) sums[c] *= shrink;
        }
        if (is_shared) NAME(weigh_shared)(scores, run, p, G, C, count, tile, out);
    }
    for (int64_t g = 0; g < G; g++)
        for (int64_t c = 0; c < C; c++) out[g * C + c] /= total[g];
}

#include "end_vector.h"
