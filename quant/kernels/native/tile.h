/* The product of one block of 32 output channels with up to ROWS rows, for one instruction set.

   Included once for each and each width; before it come the macros

     NAME(x)         the name of x for this instruction set and width
     WIDTH           columns of a channel in a word, PAIR or QUAD
     W               a register of weights or activations
     LOAD_W(p)       the words of LANES channels at p
     LOAD_X(p)       a word of activations at p, in every lane: two int16 or four uint8
     DOT(s, w, x)    s + the dot product of each lane's word

   which it takes back, and those of the instruction set, which end_tile.h takes back:

     TARGET          the attribute that lets the compiler use it
     LANES           int32 sums in a register
     V               a register of sums
     ZERO()          no sums
     ADD_TO(p, s)    add the sums to the int64 at p
     KEEP(a, b)      finish these sums before the next load

   int16 x int16 -> int32 pairs (pmaddwd, vpdpwssd, smlal) and uint8 x int8 -> int32 quads (vpdpbusd)
   never saturate within CHUNK columns. */

#define NUM_V (BLOCK / LANES)
#define V_BYTES (WIDTH * LANES)
#define LINE (WIDTH * BLOCK) /* bytes of the words of all channels */

/* Two registers of channels, `rows` rows: 2 * rows sums stay in registers. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const int8_t *w, const char *x, int64_t x_stride, int64_t num_words, const int rows,
    int64_t *sums, const int8_t *ahead, int64_t ahead_step) {
    V low[ROWS], high[ROWS];
    for (int m = 0; m < rows; m++) low[m] = high[m] = ZERO();
    for (int64_t k = 0; k < num_words; k++) {
        __builtin_prefetch(ahead + k * ahead_step, 0, 3);
        if (LINE > 64 && NUM_V == 2) /* a lone tile fetches two cache lines */
            __builtin_prefetch(ahead + k * ahead_step + ahead_step / 2, 0, 3);
        W w_low = LOAD_W(w + LINE * k), w_high = LOAD_W(w + LINE * k + V_BYTES);
        for (int m = 0; m < rows; m++) {
            W word = LOAD_X(x + m * x_stride + WORD * k);
            low[m] = DOT(low[m], w_low, word);
            high[m] = DOT(high[m], w_high, word);
            /* Hoisted loads would need more registers than there are. */
            KEEP(low[m], high[m]);
        }
    }
    for (int m = 0; m < rows; m++) {
        ADD_TO(sums + BLOCK * m, low[m]);
        ADD_TO(sums + BLOCK * m + LANES, high[m]);
    }
}

/* One row: all channels of the block at once, so that the weights are read in one stream. */
TARGET static inline __attribute__((always_inline)) void NAME(row)(
    const int8_t *w, const char *x, int64_t num_words, int64_t *sums) {
    V sum[NUM_V];
    for (int v = 0; v < NUM_V; v++) sum[v] = ZERO();
    for (int64_t k = 0; k < num_words; k++) {
        W word = LOAD_X(x + WORD * k);
        for (int at = 0; at < LINE; at += 64)
            __builtin_prefetch(w + LINE * k + AHEAD + at, 0, 3);
        for (int v = 0; v < NUM_V; v++)
            sum[v] = DOT(sum[v], LOAD_W(w + LINE * k + V_BYTES * v), word);
    }
    for (int v = 0; v < NUM_V; v++) ADD_TO(sums + LANES * v, sum[v]);
}

TARGET static void NAME(block)(
    const int8_t *w, const char *x, int64_t x_stride, int64_t num_rows, int64_t num_words,
    int64_t *sums, const int8_t *ahead) {
    if (num_rows == 1) {
        NAME(row)(w, x, num_words, sums);
        return;
    }
    /* Each tile fetches its share of the weights that come next, so that memory never waits. */
    int64_t num_tiles = (num_rows + ROWS - 1) / ROWS * (NUM_V / 2), step = LINE / num_tiles;
    for (int64_t m = 0; m < num_rows;) {
        /* 8 rows are two tiles of 4, not 6 and 2: even tiles hide the loads of the weights. */
        int64_t left = num_rows - m, rows = left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;
        for (int v = 0; v < NUM_V; v += 2) {
            const int8_t *w_v = w + V_BYTES * v;
            int64_t *sums_v = sums + BLOCK * m + LANES * v;
            const char *x_m = x + m * x_stride;
            switch (rows) {
            case 1: NAME(tile)(w_v, x_m, x_stride, num_words, 1, sums_v, ahead, step); break;
            case 2: NAME(tile)(w_v, x_m, x_stride, num_words, 2, sums_v, ahead, step); break;
            case 3: NAME(tile)(w_v, x_m, x_stride, num_words, 3, sums_v, ahead, step); break;
            case 4: NAME(tile)(w_v, x_m, x_stride, num_words, 4, sums_v, ahead, step); break;
            case 5: NAME(tile)(w_v, x_m, x_stride, num_words, 5, sums_v, ahead, step); break;
            default: NAME(tile)(w_v, x_m, x_stride, num_words, 6, sums_v, ahead, step); break;
            }
            ahead += num_words * step;
        }
        m += rows;
    }
}

#undef NUM_V
#undef V_BYTES
#undef LINE
#undef NAME
#undef WIDTH
#undef W
#undef LOAD_W
#undef LOAD_X
#undef DOT
