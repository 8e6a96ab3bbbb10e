/* A small all-reduce over shared memory, for ranks that arrive about together: the whole turn of
   SharedMemoryGroup._reduce_at_once in one call, which a program may hold (quant/kernels/native).

   In Python the same turn takes 20 us when its code is in cache and five to ten times that between
   the products of a decode step, whose weights have just gone through the caches. A rank's number is
   stored with release and loaded with acquire order, so who sees it sees the data behind it. */

#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { SUM_FLOAT32, MAX_FLOAT32, SUM_INT32, SUM_INT64 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int all_reached(const char *cells, int64_t cell_bytes, int64_t size, uint64_t turn) {
    for (int64_t rank = 0; rank < size; rank++) {
        const uint64_t *cell = (const uint64_t *)(cells + rank * cell_bytes);
        if (__atomic_load_n(cell, __ATOMIC_ACQUIRE) < turn) return 0;
    }
    return 1;
}

#define ADD_UP(TYPE, UPDATE)                                                                       \
    {                                                                                              \
        TYPE *total = x;                                                                           \
        memcpy(total, slots[0], count * sizeof(TYPE));                                             \
        for (int64_t rank = 1; rank < size; rank++) {                                              \
            const TYPE *part = slots[rank];                                                        \
            for (int64_t i = 0; i < count; i++) UPDATE;                                            \
        }                                                                                          \
        break;                                                                                     \
    }

/* x = the slots of all ranks, added up in rank order (a NaN is larger than all). */
static void add_up(void *x, void *const *slots, int64_t size, int64_t count, int64_t kind) {
    switch (kind) {
    case SUM_FLOAT32: ADD_UP(float, total[i] += part[i])
    case MAX_FLOAT32: ADD_UP(float, total[i] = part[i] > total[i] || part[i] != part[i] ? part[i] : total[i])
    case SUM_INT32: ADD_UP(int32_t, total[i] += part[i])
    default: ADD_UP(int64_t, total[i] += part[i])
    }
}

/* What a group of ranks has reached; zero at first. `turn`: the last that this rank has begun.
   all_reached: a turn that all ranks are known to have reached. stage: where in a turn a call of
   shardrun_all_reduce stopped to wait. */
typedef struct {
    uint64_t turn, all_reached, stage;
} progress_t;

/* cells: the numbers of all ranks, cell_bytes apart. slots: for each half, the address of each rank's
   slot, in rank order. x: num_bytes, `count` numbers. It looks without a pause for spin_s and lets
   others run until yield_s. seconds: set to what the call took, its pauses included. */
typedef struct {
    progress_t *progress;
    char *cells;
    int64_t cell_bytes, rank, size;
    void *x;
    void *const *slots;
    int64_t num_bytes, count, kind;
    double spin_s, yield_s, started, seconds;
} all_reduce_t;

/* Whether all ranks reach a turn within this call's patience. */
static int meet(const all_reduce_t *a, uint64_t turn) {
    double start = 0, waited = 0;
    while (!all_reached(a->cells, a->cell_bytes, a->size, turn)) {
        double time = now();
        if (start == 0) start = time;
        waited = time - start;
        if (waited > a->yield_s) return 0;
        if (waited > a->spin_s) sched_yield();
    }
    return 1;
}

enum { BEGIN, WRITE, READ };

/* x = the sum over the ranks. A turn: wait until all have read what this rank wrote two turns ago, lay
   x down in this rank's slot, say so, wait a little for the others, and add up.
   Returns 0, or 1 if others were not there in time: whoever called waits, and calls again. */
int shardrun_all_reduce(all_reduce_t *a) {
    progress_t *p = a->progress;
    if (p->stage == BEGIN) {
        a->started = now();
        p->turn++;
        p->stage = WRITE;
    }
    void *const *slots = a->slots + p->turn % 2 * a->size;
    if (p->stage == WRITE) {
        if (p->all_reached + 1 < p->turn && !meet(a, p->turn - 1)) return 1;
        memcpy(slots[a->rank], a->x, a->num_bytes);
        __atomic_store_n((uint64_t *)(a->cells + a->rank * a->cell_bytes), p->turn, __ATOMIC_RELEASE);
        p->stage = READ;
    }
    if (!meet(a, p->turn)) return 1;
    add_up(a->x, slots, a->size, a->count, a->kind);
    p->all_reached = p->turn;
    p->stage = BEGIN;
    a->seconds = now() - a->started;
    return 0;
}
