/* A program: calls that were recorded once, made again one after the other.

   Between the products of a decode step Python and ctypes take longer than the work, as the weights
   have just gone through the caches and both start cold. A step's calls are the same every time but
   for what lies in its buffers, so they can be made without either. */

#define _GNU_SOURCE
#include <stdint.h>
#include <time.h>

typedef struct {
    int (*function)(void *);
    void *arguments;
} call_t;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Makes the calls from `first` on. Returns how far it came: `count`, or the index of a call that
   returned 1, because it waits for others and must be made again.
   seconds: NULL, or [count]: what each call took is added to it. */
int64_t shardrun_run(const call_t *calls, int64_t first, int64_t count, double *seconds) {
    for (int64_t i = first; i < count; i++) {
        double start = seconds ? now() : 0;
        int must_wait = calls[i].function(calls[i].arguments);
        if (seconds) seconds[i] += now() - start;
        if (must_wait) return i;
    }
    return count;
}
