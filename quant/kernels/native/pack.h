/* How int8 weights lie in memory; int8.c has the function. */

#ifndef SHARDRUN_PACK_H
#define SHARDRUN_PACK_H

#include <stdint.h>

/* int8 [N, K], rows `stride` apart, into packed[ceil(N / 32)][ceil(K / 2)][32][2], zeros beyond. */
void shardrun_pack(const int8_t *src, int64_t stride, int64_t N, int64_t K, int8_t *packed);

#endif
