/* Decode attention: one query of each head over the keys and values of its sequence in the cache.

   Keys and values are read where they lie, once for all query heads that share them, and no further
   than the sequence goes. A head's result depends on no other head: it is the same on every number
   of ranks and threads.

   A cache of int8 has float32 scales. Those of each token and head multiply its score and its weight;
   static ones of each channel multiply the query and the result. */

#include <float.h>

#include "vector_types.h"

#define PIECE 64       /* positions between two looks at the maximum; the keys of a piece stay in L1 */
#define MAX_CHANNELS 256
#define MAX_GROUP 16 /* query heads of a kv head */

/* Keys and values of one kv head of one sequence, from element `at` on.
   key_scale, value_scale: of each position, or NULL. */
typedef struct {
    const void *keys, *values;
    int type;
    int64_t at;
    const float *key_scale, *value_scale;
} run_t;

#define SET portable
#include "attend.h"
#ifdef __x86_64__
#define SET avx2
#include "attend.h"
#endif

/* q: [B, K * G, C] of `type` (FLOAT32, BFLOAT16), heads q_head apart, sequences q_row apart; out:
   [B, K * G, C], contiguous. keys, values: of `cached`, that type or INT8; position p of kv head k of
   sequence b starts at element b * row + k * head + p * C. key_scale, value_scale: of INT8; that of
   the position at b * scale_row + k * scale_head + p, or where is_static that of channel c at
   k * C + c. positions: of each query; it sees those up to its own, the
   last `window` of them where that is not 0. C: a multiple of 16, at most
   MAX_CHANNELS; G: at most MAX_GROUP. All strides in elements. */
typedef struct {
    int64_t set;
    const void *q;
    int64_t type, q_row, q_head;
    const void *keys, *values;
    int64_t cached, row, head;
    const float *key_scale, *value_scale;
    int64_t is_static, scale_row, scale_head;
    const int64_t *positions;
    int64_t window, B, K, G, C;
    void *out;
} attend_t;

/* The queries of kv head k of sequence b, times 1 / sqrt(C) and the static scales of its keys. */
static void scale_queries(const attend_t *a, int64_t b, int64_t k, float *to) {
    float scale = 1.0f / sqrtf((float)a->C);
    for (int64_t g = 0; g < a->G; g++)
        for (int64_t c = 0; c < a->C; c++) {
            int64_t at = b * a->q_row + (k * a->G + g) * a->q_head + c;
            float q = scale * widen(a->q, a->type, at);
            to[g * a->C + c] = a->is_static ? q * a->key_scale[k * a->C + c] : q;
        }
}

/* One kv head's results, times the static scales of its values. */
static void store_results(const attend_t *a, int64_t k, float *results, int64_t to) {
    int64_t count = a->G * a->C;
    if (a->is_static)
        for (int64_t i = 0; i < count; i++) results[i] *= a->value_scale[k * a->C + i % a->C];
    if (a->type == FLOAT32) memcpy((float *)a->out + to, results, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)a->out)[to + i] = to_bfloat16(results[i]);
}

/* out[b, h] = softmax(q[b, h] . keys[b, h / G] / sqrt(C)) . values[b, h / G]. */
int shardrun_attend(const attend_t *a) {
    void (*attend)(const float *, const run_t *, int64_t, int64_t, int64_t, float *) =
        attend_portable;
#ifdef __x86_64__
    if (a->set > PORTABLE) attend = attend_avx2;
#endif
    int64_t B = a->B, K = a->K, G = a->G, C = a->C;
    int has_scales = a->cached == INT8 && !a->is_static;
#pragma omp parallel for schedule(dynamic, 1) if (B * K * (a->positions[0] + 8) > 512)
    for (int64_t task = 0; task < B * K; task++) {
        int64_t b = task / K, k = task % K, length = a->positions[b] + 1;
        int64_t first = a->window && length > a->window ? length - a->window : 0;
        int64_t scale = b * a->scale_row + k * a->scale_head + first;
        float scaled[MAX_GROUP * MAX_CHANNELS], results[MAX_GROUP * MAX_CHANNELS];
        run_t run = {
            a->keys, a->values, (int)a->cached, b * a->row + k * a->head + first * C,
            has_scales ? a->key_scale + scale : NULL, has_scales ? a->value_scale + scale : NULL};
        scale_queries(a, b, k, scaled);
        attend(scaled, &run, G, C, length - first, results);
        store_results(a, k, results, task * G * C);
    }
    return 0;
}

/* keys, values: [T, H, bytes], tokens `stride` bytes apart, heads one after the other. slots: [T].
   to_keys, to_values: slot s of head h starts at byte h * head + s * bytes. */
typedef struct {
    const char *keys, *values;
    int64_t stride;
    const int64_t *slots;
    int64_t T, H, bytes;
    char *to_keys, *to_values;
    int64_t head;
} write_slots_t;

/* Stores the keys and values of some tokens at their slots of the cache. */
int shardrun_write_slots(const write_slots_t *a) {
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t h = 0; h < a->H; h++) {
            int64_t from = t * a->stride + h * a->bytes, to = h * a->head + a->slots[t] * a->bytes;
            memcpy(a->to_keys + to, a->keys + from, a->bytes);
            memcpy(a->to_values + to, a->values + from, a->bytes);
        }
    return 0;
}

/* keys, values: [T, H, C] of `type`, tokens `stride` elements apart, heads one after the other. slots:
   [T]. to_keys, to_values: int8; slot s of head h starts at h * head + s * C. key_scale, value_scale:
   is written, that of slot s of head h at h * scale_head + s; where is_static, given: [H, C]. C: a
   multiple of 8. */
typedef struct {
    int64_t set;
    const void *keys, *values;
    int64_t type, stride;
    const int64_t *slots;
    int64_t T, H, C;
    int8_t *to_keys, *to_values;
    int64_t head;
    float *key_scale, *value_scale;
    int64_t is_static, scale_head;
} write_int8_t;

/* Stores the keys and values of some tokens as integers at their slots of the cache. */
int shardrun_write_int8(const write_int8_t *a) {
    float (*write)(const void *, int, int64_t, int64_t, const float *, int8_t *) =
        write_head_portable;
#ifdef __x86_64__
    if (a->set > PORTABLE) write = write_head_avx2;
#endif
#pragma omp parallel for schedule(static) if (a->T * a->H * a->C > 262144)
    for (int64_t task = 0; task < 2 * a->T * a->H; task++) {
        int64_t t = task / 2 / a->H, h = task / 2 % a->H, is_value = task % 2;
        int64_t at = a->slots[t], to = h * a->head + at * a->C;
        float *scale = is_value ? a->value_scale : a->key_scale;
        float found = write(
            is_value ? a->values : a->keys, (int)a->type, t * a->stride + h * a->C, a->C,
            a->is_static ? scale + h * a->C : NULL, (is_value ? a->to_values : a->to_keys) + to);
        if (!a->is_static) scale[h * a->scale_head + at] = found;
    }
    return 0;
}
