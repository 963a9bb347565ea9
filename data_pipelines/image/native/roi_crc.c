/* The CRC-32 of zlib, 64 bytes at a time by multiplication without carries: V. Gopal and others, "Fast CRC computation
 * for generic polynomials using PCLMULQDQ instruction" (Intel, 2009), whose constants for the reflected polynomial these
 * are. */

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ROI_PLAIN)
#include <immintrin.h>

#define CLMUL __attribute__((target("pclmul,sse4.1")))

/* Powers of x, reflected, by which 16 bytes are multiplied to stand 64 or 16 bytes further on. */
CLMUL static __m128i by_64(void) { return _mm_set_epi64x(0x01c6e41596, 0x0154442bd4); }
CLMUL static __m128i by_16(void) { return _mm_set_epi64x(0x00ccaa009e, 0x01751997d0); }

CLMUL static inline __m128i fold(__m128i sum, __m128i powers, __m128i next) {
  __m128i low = _mm_clmulepi64_si128(sum, powers, 0x00), high = _mm_clmulepi64_si128(sum, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* 16 bytes to 4: 64 bits are left after two more multiplications, and Barrett's reduction ends it. */
CLMUL static uint32_t reduced(__m128i sum) {
  const __m128i low_words = _mm_setr_epi32(-1, 0, -1, 0), polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, by_16(), 0x10));
  __m128i rest = _mm_srli_si128(sum, 4), power = _mm_set_epi64x(0, 0x0163cd6124);
  sum = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(sum, low_words), power, 0x00), rest);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, low_words), polynomial, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), polynomial, 0x00);
  return (uint32_t)_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1);
}

CLMUL static uint32_t crc_of_blocks(const __m128i *blocks, size_t num_blocks) {
  __m128i sums[4];
  for (int i = 0; i < 4; i++) sums[i] = _mm_loadu_si128(blocks + i);
  /* A CRC begins with all bits set, and ends with all of them turned. */
  sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(-1));
  size_t place = 4;
  for (; place + 4 <= num_blocks; place += 4)
    for (int i = 0; i < 4; i++) sums[i] = fold(sums[i], by_64(), _mm_loadu_si128(blocks + place + i));
  __m128i sum = sums[0];
  for (int i = 1; i < 4; i++) sum = fold(sum, by_16(), sums[i]);
  for (; place < num_blocks; place++) sum = fold(sum, by_16(), _mm_loadu_si128(blocks + place));
  return ~reduced(sum);
}

/* Fills `crc` with that of the first bytes of `data`, and returns how many they are; 0 where it cannot be done. */
size_t roi_crc(const unsigned char *data, size_t size, uint32_t *crc) {
  if (size < 64 || !__builtin_cpu_supports("pclmul")) return 0;
  *crc = crc_of_blocks((const __m128i *)data, size / 16);
  return size / 16 * 16;
}
#else
size_t roi_crc(const unsigned char *data, size_t size, uint32_t *crc) {
  (void)data, (void)size, (void)crc;
  return 0;
}
#endif
