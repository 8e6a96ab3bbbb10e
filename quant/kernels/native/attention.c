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

/* out[b, h] = softmax(q[b, h] . keys[b, h / G] / sqrt(C)) . values[b, h / G].

   q: [B, K * G, C] of `type` (FLOAT32, BFLOAT16), heads q_head apart, sequences q_row apart; out:
   [B, K * G, C], contiguous. keys, values: position p of kv head k of sequence b starts at element
   b * row + k * head + p * C. lengths: positions of each sequence in use, at least 1. C: a multiple
   of 16, at most MAX_CHANNELS; G: at most MAX_GROUP. All strides in elements. */
void shardrun_attend(
    int set, const void *q, int64_t q_row, int64_t q_head, const void *keys, const void *values,
    int type, int64_t row, int64_t head, const int64_t *lengths, int64_t B, int64_t K, int64_t G,
    int64_t C, void *out) {
    void (*attend)(
        const float *, const void *, const void *, int, int64_t, int64_t, int64_t, int64_t,
        float *) =
        attend_portable;
#ifdef __x86_64__
    if (set > 0) attend = attend_avx2;
#endif
    (void)set;
    float scale = 1.0f / sqrtf((float)C);
#pragma omp parallel for schedule(dynamic, 1) if (B * K * lengths[0] > 512)
    for (int64_t task = 0; task < B * K; task++) {
        int64_t b = task / K, k = task % K, to = task * G * C;
        float scaled[MAX_GROUP * MAX_CHANNELS], result[MAX_GROUP * MAX_CHANNELS];
        for (int64_t g = 0; g < G; g++)
            for (int64_t c = 0; c < C; c++)
                scaled[g * C + c] =
                    scale * widen(q, type, b * q_row + (k * G + g) * q_head + c);
        attend(scaled, keys, values, type, b * row + k * head, G, C, lengths[b], result);
        if (type == FLOAT32) memcpy((float *)out + to, result, G * C * sizeof(float));
        else
            for (int64_t c = 0; c < G * C; c++) ((uint16_t *)out)[to + c] = to_bfloat16(result[c]);
    }
}
