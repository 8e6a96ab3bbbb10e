/* How weights get into memory in blocks of 32 channels; int8.c and int4.c have the functions.

   Each writes the channels [first, first + N) of what is packed, and no others: the parts of a fused
   weight come one after the other, and need not begin with a block. */

#ifndef SHARDRUN_PACK_H
#define SHARDRUN_PACK_H

#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* of Linux 5.14 */
#endif
#endif

/* int8 [N, K], rows `stride` apart, into packed[][ceil(K / 2)][32][2]. */
void shardrun_pack_pairs(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first);

/* The same into packed[][ceil(K / 4) + 1][32][4]; the last of a block: the sums of its channels, int32. */
void shardrun_pack_quads(
    const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed, int64_t first);

#define LEAST_TOUCHED (64 << 10) /* bytes; below it a system call is not worth it */

/* Memory that is about to be written gets its pages all at once: that was seen to cost less
   than one fault for each of them. A kernel that does not know how leaves it to the faults. */
static inline void touch_pages(void *p, int64_t num_bytes) {
#ifdef __linux__
    if (num_bytes < LEAST_TOUCHED) return;
    uintptr_t before = (uintptr_t)p % (uintptr_t)sysconf(_SC_PAGESIZE);
    madvise((char *)p - before, num_bytes + before, MADV_POPULATE_WRITE);
#endif
}

#endif
