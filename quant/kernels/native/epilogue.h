/* What becomes of the sums of a product: stored as they are, or scaled, with the bias, rounded once. */

#ifndef SHARDRUN_EPILOGUE_H
#define SHARDRUN_EPILOGUE_H

#include <stdint.h>
#include <string.h>

#include "types.h"

#define BLOCK 32 /* output channels side by side */

/* The sums of a panel of rows are what a thread holds at a time. All blocks of channels pass the rows of
   a round before the next round comes, so that the integers of a long prompt come from a cache near by;
   the rounds are even, as each reads all weights. */
#define PANEL 48
#define MOST_PANELS 4 /* of a round */

/* Rows of a round: whole panels. */
static inline int64_t round_rows(int64_t M) {
    int64_t panels = (M + PANEL - 1) / PANEL, rounds = (panels + MOST_PANELS - 1) / MOST_PANELS;
    return rounds ? (panels + rounds - 1) / rounds * PANEL : PANEL;
}

typedef struct {
    const float *scale; /* [N], or NULL where the sums are scaled already */
    const void *bias;   /* [N] of bias_type, or NULL */
    int64_t bias_type;
    void *out; /* [M, N] of out_type */
    int64_t out_type, N;
} epilogue_t;

/* Bare integer sums, from element `at` of the output on. */
static inline void store_sums(const epilogue_t *e, int64_t at, int64_t count, const int64_t *sums) {
    if (e->out_type == INT64) memcpy((int64_t *)e->out + at, sums, count * sizeof *sums);
    else
        for (int64_t n = 0; n < count; n++) ((int32_t *)e->out)[at + n] = (int32_t)sums[n];
}

/* At most BLOCK sums of row m, from channel n0 on, each rounded to float32 already; they are
   overwritten. The order of the two products is part of the result's bits (quant/activations.py). */
static inline void scale_sums(
    const epilogue_t *e, int64_t m, int64_t n0, int64_t count, float *sums, float row_scale) {
    int64_t at = m * e->N + n0;
    for (int64_t n = 0; n < count; n++) sums[n] *= row_scale;
    if (e->scale)
        for (int64_t n = 0; n < count; n++) sums[n] *= e->scale[n0 + n];
    if (e->bias)
        for (int64_t n = 0; n < count; n++) sums[n] += widen(e->bias, e->bias_type, n0 + n);
    if (e->out_type == FLOAT32) memcpy((float *)e->out + at, sums, count * sizeof *sums);
    else
        for (int64_t n = 0; n < count; n++) ((uint16_t *)e->out)[at + n] = to_bfloat16(sums[n]);
}

#endif
