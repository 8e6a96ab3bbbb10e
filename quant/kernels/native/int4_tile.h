/* What a product with int4 or grouped weights does to one step of columns of one block of 32 output
   channels, for one instruction set.

   Included once for each; before it come the macros

     NAME(x)           the name of x for this instruction set
     TARGET            the attribute that lets the compiler use it
     LANES             int32 sums in a register
     V, W              a register of sums, a register of weights or activations (int16 pairs)
     ZERO()            no sums
     LOAD_NIBBLES(p)   the 8 nibbles of each of LANES channels at p
     NIBBLES(v, i)     pair i of them, widened to int16
     LOAD_BYTES(p)     2 * LANES int8 weights at p, widened to int16
     LOAD_W(p)         2 * LANES int16 weights at p
     STORE_W(p, w)     its counterpart
     LOAD_X(p)         two int16 activations at p, in every lane
     DOT(s, w, x)      s + the dot product of each lane's pair
     STORE_V(p, s)     store the sums as int32
     F, LOAD_F(p)      a register of floats, those at p
     ADD_SCALED(p, s, f)
                       add to the floats at p the sums, rounded to float32, times f: two roundings
                       more, in this order (quant/kernels/reference.py)
     FOUR(f)           f(0) to f(3), whose arguments are constants where NIBBLES needs them to be
     KEEP(a, b)        finish these sums before the next load

   The sums of a step fit int32: STEP columns of 32258 * 128. */

#define NUM_V (BLOCK / LANES)

/* One row times nibbles: unpacked in registers, all channels at once, so that the weights are read in
   one stream. */
TARGET static void NAME(int4_row)(const tile_t *t) {
    const uint8_t *w = t->w;
    const int16_t *x = t->x, *end = x + t->num_columns, *group_end = x + t->first_group;
    const float *scale = t->scale;
    do {
        V sum[NUM_V];
        for (int v = 0; v < NUM_V; v++) sum[v] = ZERO();
        for (; x < group_end; x += 8, w += 4 * BLOCK) {
            W pairs[4] = {LOAD_X(x), LOAD_X(x + 2), LOAD_X(x + 4), LOAD_X(x + 6)};
            __builtin_prefetch(w + AHEAD, 0, 3);
            __builtin_prefetch(w + AHEAD + 64, 0, 3);
            for (int v = 0; v < NUM_V; v++) {
                N4 nibbles = LOAD_NIBBLES(w + 4 * LANES * v);
#define PAIR(i) sum[v] = DOT(sum[v], NIBBLES(nibbles, i), pairs[i]);
                FOUR(PAIR)
#undef PAIR
            }
        }
        for (int v = 0; v < NUM_V; v++)
            if (scale) ADD_SCALED(t->out + LANES * v, sum[v], LOAD_F(scale + LANES * v));
            else STORE_V(t->sums + LANES * v, sum[v]);
        if (scale) scale += BLOCK;
        group_end = end - group_end > t->group ? group_end + t->group : end;
    } while (x < end);
}

/* 2 * LANES weights, pair i of eight columns at w, of the lower or the higher half of a part. */
TARGET static inline __attribute__((always_inline)) W NAME(weights)(
    const int source, const void *w, int64_t v, const int half, const int i) {
    if (source == WIDE) return LOAD_W((const int16_t *)w + 2 * LANES * (2 * i + half));
    if (source == BYTES) return LOAD_BYTES((const uint8_t *)w + 2 * BLOCK * i + 2 * LANES * (v + half));
    return NIBBLES(LOAD_NIBBLES((const uint8_t *)w + 4 * LANES * (v + half)), i);
}

/* A part of the block: two registers of channels, `rows` rows: 2 * rows sums stay in registers. */
TARGET static inline __attribute__((always_inline)) void NAME(int4_part)(
    const int source, const tile_t *t, const int rows) {
    int64_t v = 2 * t->part, ahead_step = t->ahead_step;
    const char *w = t->w;
    int16_t *wide = t->wide;
    const int16_t *x = t->x;
    const uint8_t *ahead = t->ahead;
    const int16_t *end = x + t->num_columns, *group_end = x + t->first_group;
    const float *scale = t->scale;
    do {
        V low[ROWS], high[ROWS];
        for (int m = 0; m < rows; m++) low[m] = high[m] = ZERO();
        for (; x < group_end; x += 8) {
            __builtin_prefetch(ahead, 0, 3);
            if (source == BYTES) __builtin_prefetch(ahead + 64, 0, 3);
            ahead += ahead_step;
#define PAIR(i)                                                                                    \
    {                                                                                              \
        W w_low = NAME(weights)(source, w, v, 0, i), w_high = NAME(weights)(source, w, v, 1, i);   \
        if (source == NIBBLES_KEPT) {                                                              \
            STORE_W(wide + 4 * LANES * i, w_low);                                                  \
            STORE_W(wide + 4 * LANES * i + 2 * LANES, w_high);                                     \
        }                                                                                          \
        for (int m = 0; m < rows; m++) {                                                           \
            W pair = LOAD_X(x + m * ROW + 2 * i);                                                  \
            low[m] = DOT(low[m], w_low, pair);                                                     \
            high[m] = DOT(high[m], w_high, pair);                                                  \
            /* Hoisted loads would need more registers than there are. */                          \
            KEEP(low[m], high[m]);                                                                 \
        }                                                                                          \
    }
            FOUR(PAIR)
#undef PAIR
            w += source == WIDE ? 32 * LANES : source == BYTES ? 8 * BLOCK : 4 * BLOCK;
            wide += 16 * LANES;
        }
        for (int m = 0; m < rows; m++) {
            int64_t at = BLOCK * m + LANES * v;
            if (scale) {
                ADD_SCALED(t->out + at, low[m], LOAD_F(scale + LANES * v));
                ADD_SCALED(t->out + at + LANES, high[m], LOAD_F(scale + LANES * (v + 1)));
            } else {
                STORE_V(t->sums + at, low[m]);
                STORE_V(t->sums + at + LANES, high[m]);
            }
        }
        if (scale) scale += BLOCK;
        group_end = end - group_end > t->group ? group_end + t->group : end;
    } while (x < end);
}

TARGET static inline __attribute__((always_inline)) void NAME(int4_rows)(
    const int source, const tile_t *t) {
    switch (t->rows) {
    case 1: NAME(int4_part)(source, t, 1); break;
    case 2: NAME(int4_part)(source, t, 2); break;
    case 3: NAME(int4_part)(source, t, 3); break;
    case 4: NAME(int4_part)(source, t, 4); break;
    case 5: NAME(int4_part)(source, t, 5); break;
    default: NAME(int4_part)(source, t, 6); break;
    }
}

/* At most ROWS rows times a part's weights of a step, from wherever they are. */
TARGET static void NAME(int4_tile)(const tile_t *t) {
    switch (t->source) {
    case NIBBLES_ROW: NAME(int4_row)(t); break;
    case NIBBLES_ONCE: NAME(int4_rows)(NIBBLES_ONCE, t); break;
    case NIBBLES_KEPT: NAME(int4_rows)(NIBBLES_KEPT, t); break;
    case WIDE: NAME(int4_rows)(WIDE, t); break;
    default: NAME(int4_rows)(BYTES, t); break;
    }
}

/* ADD_SCALED of sums in two planes: rounded to float32 once. */
TARGET static void NAME(add_planes)(const int32_t *sums, const float *scale, float *out) {
    for (int n = 0; n < BLOCK; n++)
        out[n] += (float)((double)sums[n] * RADIX + (double)sums[BLOCK + n]) * scale[n];
}

/* out += the sums of one plane or two, in integers. */
TARGET static void NAME(add_step)(const int32_t *sums, int64_t num_planes, int64_t *out) {
    if (num_planes == 2)
        for (int n = 0; n < BLOCK; n++) out[n] += (int64_t)sums[n] * RADIX + sums[BLOCK + n];
    else
        for (int n = 0; n < BLOCK; n++) out[n] += sums[n];
}

TARGET static void NAME(widen_scales)(
    const void *stored, int64_t type, int64_t at, int64_t count, float *scale) {
    if (type == FLOAT16)
        for (int64_t n = 0; n < count; n++) scale[n] = widen_float16(((const uint16_t *)stored)[at + n]);
    else if (type == BFLOAT16)
        for (int64_t n = 0; n < count; n++) scale[n] = widen_bfloat16(((const uint16_t *)stored)[at + n]);
    else memcpy(scale, (const float *)stored + at, count * sizeof *scale);
}

#undef NUM_V
#undef NAME
#undef TARGET
#undef LANES
#undef V
#undef W
#undef N4
#undef ZERO
#undef LOAD_NIBBLES
#undef NIBBLES
#undef LOAD_BYTES
#undef LOAD_W
#undef STORE_W
#undef LOAD_X
#undef DOT
#undef STORE_V
#undef F
#undef LOAD_F
#undef ADD_SCALED
#undef FOUR
#undef KEEP
