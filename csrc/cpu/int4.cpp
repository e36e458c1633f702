// pack_int4 and unpack_int4 over rows.
//
// Math:     spec 8. A pair of codes is one 16-bit lane, so packing is two masks and a shift in the
// lane. Shapes:   one row a call. Dtypes:   int8 codes, uint8 bytes. Tiling:   64 codes (AVX-512)
// or 32 (AVX2) a step. Cost:     memory-bound. Floor: 1.5 bytes of traffic per code. Numerics:
// integers. Edges:    an odd last column is paired with nibble 0; tails use the scalar formula.
// Tests:    tests/kernels/test_native.py.
// Bench:    python -m benchmarks.run --op pack_int4
#include <immintrin.h>

#include "cpu/int4_rows.h"
#include "cpu/isa.h"

namespace llmqat::cpu {
namespace {

void pack_scalar(const int8_t* codes, int64_t columns, uint8_t* packed) {
  for (int64_t j = 0; j < columns / 2; ++j) packed[j] = pack_pair(codes[2 * j], codes[2 * j + 1]);
  if (columns % 2 != 0) packed[columns / 2] = pack_pair(codes[columns - 1], 0);
}

void unpack_scalar(const uint8_t* packed, int64_t columns, int8_t* codes) {
  for (int64_t j = 0; j < columns / 2; ++j) {
    codes[2 * j] = unpack_even(packed[j]);
    codes[2 * j + 1] = unpack_odd(packed[j]);
  }
  if (columns % 2 != 0) codes[columns - 1] = unpack_even(packed[columns / 2]);
}

LLMQAT_TARGET_AVX2 void pack_avx2(const int8_t* codes, int64_t columns, uint8_t* packed) {
  const __m256i even = _mm256_set1_epi16(0x000F), odd = _mm256_set1_epi16(0x00F0);
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i pair =
        _mm256_or_si256(_mm256_and_si256(v, even), _mm256_and_si256(_mm256_srli_epi16(v, 4), odd));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pair, pair), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_castsi256_si128(bytes));
  }
  pack_scalar(codes + i, columns - i, packed + i / 2);
}

LLMQAT_TARGET_AVX2 void unpack_avx2(const uint8_t* packed, int64_t columns, int8_t* codes) {
  const __m256i even = _mm256_set1_epi16(0x000F), odd = _mm256_set1_epi16(0x0F00);
  const __m256i sign = _mm256_set1_epi8(0x08);
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m256i v = _mm256_cvtepu8_epi16(bytes);
    const __m256i pair =
        _mm256_or_si256(_mm256_and_si256(v, even), _mm256_and_si256(_mm256_slli_epi16(v, 4), odd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                        _mm256_sub_epi8(_mm256_xor_si256(pair, sign), sign));
  }
  unpack_scalar(packed + i / 2, columns - i, codes + i);
}

LLMQAT_TARGET_AVX512 void pack_avx512(const int8_t* codes, int64_t columns, uint8_t* packed) {
  const __m512i even = _mm512_set1_epi16(0x000F), odd = _mm512_set1_epi16(0x00F0);
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    const __m512i v = _mm512_loadu_si512(codes + i);
    const __m512i pair =
        _mm512_or_si512(_mm512_and_si512(v, even), _mm512_and_si512(_mm512_srli_epi16(v, 4), odd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), _mm512_cvtepi16_epi8(pair));
  }
  pack_scalar(codes + i, columns - i, packed + i / 2);
}

LLMQAT_TARGET_AVX512 void unpack_avx512(const uint8_t* packed, int64_t columns, int8_t* codes) {
  const __m512i even = _mm512_set1_epi16(0x000F), odd = _mm512_set1_epi16(0x0F00);
  const __m512i sign = _mm512_set1_epi8(0x08);
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2));
    const __m512i v = _mm512_cvtepu8_epi16(bytes);
    const __m512i pair =
        _mm512_or_si512(_mm512_and_si512(v, even), _mm512_and_si512(_mm512_slli_epi16(v, 4), odd));
    _mm512_storeu_si512(codes + i, _mm512_sub_epi8(_mm512_xor_si512(pair, sign), sign));
  }
  unpack_scalar(packed + i / 2, columns - i, codes + i);
}

}  // namespace

void pack_row(const int8_t* codes, int64_t columns, uint8_t* packed) {
  switch (current_isa()) {
    case Isa::avx512vnni: return pack_avx512(codes, columns, packed);
    case Isa::avx2: return pack_avx2(codes, columns, packed);
    default: return pack_scalar(codes, columns, packed);
  }
}

void unpack_row(const uint8_t* packed, int64_t columns, int8_t* codes) {
  switch (current_isa()) {
    case Isa::avx512vnni: return unpack_avx512(packed, columns, codes);
    case Isa::avx2: return unpack_avx2(packed, columns, codes);
    default: return unpack_scalar(packed, columns, codes);
  }
}

}  // namespace llmqat::cpu
