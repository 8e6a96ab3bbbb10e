/* What int4_tile.h wants to be told of registers of 256 bits; NAME, TARGET and DOT differ among the
   instruction sets that have them. */
#define LANES 8
#define V __m256i
#define W __m256i
#define N4 __m256i
#define ZERO() _mm256_setzero_si256()
#define LOAD_NIBBLES(p) _mm256_loadu_si256((const __m256i *)(p))
/* A shift by nothing is none. */
#define NIBBLES(v, i) _mm256_srai_epi16((i) < 3 ? _mm256_slli_epi16(v, 12 - 4 * (i)) : (v), 12)
#define LOAD_BYTES(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_W(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE_W(p, w) _mm256_storeu_si256((__m256i *)(p), w)
#define LOAD_X(p) _mm256_set1_epi32(load_pair(p))
#define STORE_V(p, s) _mm256_storeu_si256((__m256i *)(p), s)
#define F __m256
#define LOAD_F(p) _mm256_loadu_ps(p)
#define ADD_SCALED(p, s, f)                                                                       \
    _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), _mm256_mul_ps(_mm256_cvtepi32_ps(s), f)))
#define FOUR(f) f(0) f(1) f(2) f(3)
#define KEEP(a, b) __asm__ volatile("" : "+x"(a), "+x"(b)::"memory")
