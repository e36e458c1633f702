// Vector loads and stores of the three float dtypes, as fp32 lanes, for AVX2 (8) and AVX-512 (16).
//
// The conversions give the bits of to_float / from_float in quant_math.h. No alignment is assumed.
// AVX-512 loads and stores take a lane mask: masked-off lanes are not touched, loads give 0 there.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/isa.h"
#include "llmqat/quant_math.h"

namespace llmqat::cpu {

namespace avx2 {

inline constexpr int kLanes = 8;

LLMQAT_TARGET_AVX2 inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }

LLMQAT_TARGET_AVX2 inline __m256 load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

LLMQAT_TARGET_AVX2 inline __m256 load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

LLMQAT_TARGET_AVX2 inline void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

LLMQAT_TARGET_AVX2 inline void store(bf16* p, __m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i lanes = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  // packus works within 128-bit halves: gather quarters 0 and 2.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

LLMQAT_TARGET_AVX2 inline void store(fp16* p, __m256 v) {
  const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

}  // namespace avx2

namespace avx512 {

inline constexpr int kLanes = 16;

// The first n lanes, n >= 1; all of them for n >= 16.
inline __mmask16 lanes(int64_t n) {
  return n >= kLanes ? __mmask16{0xFFFF} : static_cast<__mmask16>((1u << n) - 1u);
}

LLMQAT_TARGET_AVX512 inline __m512 load(const float* p, __mmask16 m) {
  return _mm512_maskz_loadu_ps(m, p);
}

LLMQAT_TARGET_AVX512 inline __m512 load(const bf16* p, __mmask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

LLMQAT_TARGET_AVX512 inline __m512 load(const fp16* p, __mmask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

LLMQAT_TARGET_AVX512 inline void store(float* p, __mmask16 m, __m512 v) {
  _mm512_mask_storeu_ps(p, m, v);
}

LLMQAT_TARGET_AVX512 inline void store(bf16* p, __mmask16 m, __m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(bits));
}

LLMQAT_TARGET_AVX512 inline void store(fp16* p, __mmask16 m, __m512 v) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, m, bits);
}

}  // namespace avx512

}  // namespace llmqat::cpu
