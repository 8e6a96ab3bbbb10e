/* Decode attention: one query of each head over the keys and values of its sequence in the cache.

   Keys and values are read where they lie, once for all query heads that share them, and no further
   than the sequence goes. A head's result depends on no other head: it is the same on every number
   of ranks and threads. */

#include "vector_types.h"

#define PIECE 64       /* positions between two looks at the maximum; the keys of a piece stay in L1 */
#define MAX_CHANNELS 256
#define MAX_GROUP 16 /* query heads of a kv head */

#define SET portable
#include "attend.h"
#ifdef __x86_64__
#define SET avx2
#include "attend.h"
#endif

/* q: [B, K * G, C] of `type` (FLOAT32, BFLOAT16), heads q_head apart, sequences q_row apart; out:
   [B, K * G, C], contiguous. keys, values: position p of kv head k of sequence b starts at element
   b * row + k * head + p * C. positions: of each query; it sees those up to its own. C: a multiple
   of 16, at most MAX_CHANNELS; G: at most MAX_GROUP. All strides in elements. */
typedef struct {
    int64_t set;
    const void *q;
    int64_t q_row, q_head;
    const void *keys, *values;
    int64_t type, row, head;
    const int64_t *positions;
    int64_t B, K, G, C;
    void *out;
} attend_t;

/* out[b, h] = softmax(q[b, h] . keys[b, h / G] / sqrt(C)) . values[b, h / G]. */
int shardrun_attend(const attend_t *a) {
    void (*attend)(
        const float *, const void *, const void *, int, int64_t, int64_t, int64_t, int64_t,
        float *) =
        attend_portable;
#ifdef __x86_64__
    if (a->set > 0) attend = attend_avx2;
#endif
    int64_t B = a->B, K = a->K, G = a->G, C = a->C;
    float scale = 1.0f / sqrtf((float)C);
#pragma omp parallel for schedule(dynamic, 1) if (B * K * (a->positions[0] + 8) > 512)
    for (int64_t task = 0; task < B * K; task++) {
        int64_t b = task / K, k = task % K, to = task * G * C;
        float scaled[MAX_GROUP * MAX_CHANNELS], result[MAX_GROUP * MAX_CHANNELS];
        for (int64_t g = 0; g < G; g++)
            for (int64_t c = 0; c < C; c++)
                scaled[g * C + c] =
                    scale * widen(a->q, a->type, b * a->q_row + (k * G + g) * a->q_head + c);
        attend(
            scaled, a->keys, a->values, a->type, b * a->row + k * a->head, G, C,
            a->positions[b] + 1, result);
        if (a->type == FLOAT32) memcpy((float *)a->out + to, result, G * C * sizeof(float));
        else
            for (int64_t c = 0; c < G * C; c++)
                ((uint16_t *)a->out)[to + c] = to_bfloat16(result[c]);
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
