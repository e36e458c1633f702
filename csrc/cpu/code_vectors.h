// The codes of a weight panel (int_matmul.h) as fp32 lanes of simd.h, for three instruction sets:
// the types Nibbles (panels4) and Bytes (panels8), each one quad of k of 32 channels.
//
//   load(p)        the quad at p: kBytes bytes
//   value<J, B>()  code of k J and channels B * kLanes.., exact
//   skip_one()     k 1 takes the place of k 0, and so on
//
// rounded<D>(v) is round_to<D> for numbers, infinities and the canonical NaN, in less instructions
// than round_as: the scales that come here hold no other NaN (scales_by_group).
//
// A nibble is the index of a table where there is a permutation that looks at the low 4 bits of a
// lane alone (AVX-512); elsewhere codes become the last mantissa bits of 2^23, from which 2^23 and
// the offset of the code are subtracted. fused_add is one rounding, as spec 17 wants.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "cpu/int_matmul.h"
#include "cpu/simd.h"

namespace llmqat::cpu {

inline constexpr int32_t kMantissaBits = 0x4B000000;  // 2^23: the last mantissa bit is 1
inline constexpr float kNibbleBase = 0x1p23f + 8, kByteBase = 0x1p23f + 128;

// ---- scalar ------------------------------------------------------------------------------------

namespace scalar {

inline F fused_add(F a, F b, F c) { return std::fma(a, b, c); }

template <class D>
F rounded(F v) {
  return round_as<D>(v);
}

struct Nibbles {
  static constexpr int kBytes = kQuadBytes4;
  const uint8_t* at;

  void load(const uint8_t* p) { at = p; }
  void skip_one() { ++at; }
  template <int J, int B>
  F value() const {
    constexpr int kHalf = kPanelChannels / 2;
    const int pair = at[kQuad * (B % kHalf) + J];
    return static_cast<F>((B < kHalf ? pair & 15 : pair >> 4) - 8);
  }
};

struct Bytes {
  static constexpr int kBytes = kQuadBytes8;
  const uint8_t* at;

  void load(const uint8_t* p) { at = p; }
  void skip_one() { ++at; }
  template <int J, int B>
  F value() const {
    return static_cast<F>(at[kQuad * B + J] - 128);
  }
};

}  // namespace scalar

// ---- AVX2 --------------------------------------------------------------------------------------

#define LLMQAT_FN LLMQAT_TARGET_AVX2 __attribute__((always_inline)) inline
namespace avx2 {

LLMQAT_FN F fused_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

template <class D>
LLMQAT_FN F rounded(F v) {
  if constexpr (!std::is_same_v<D, bf16>) return round_as<D>(v);
  const U u = _mm256_castps_si256(v);
  const U odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const U up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(~0xFFFF)));
}

LLMQAT_FN F mantissa_code(U bits, int32_t mask, float base) {
  const U code = _mm256_and_si256(bits, _mm256_set1_epi32(mask));
  const U wide = _mm256_or_si256(code, _mm256_set1_epi32(kMantissaBits));
  return _mm256_sub_ps(_mm256_castsi256_ps(wide), _mm256_set1_ps(base));
}

struct Nibbles {
  static constexpr int kBytes = kQuadBytes4;
  U raw[2];

  LLMQAT_FN void load(const uint8_t* p) {
    for (int i = 0; i < 2; ++i)
      raw[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
  }
  LLMQAT_FN void skip_one() {
    for (int i = 0; i < 2; ++i) raw[i] = _mm256_srli_epi32(raw[i], 8);
  }
  template <int J, int B>
  LLMQAT_FN F value() const {
    return mantissa_code(_mm256_srli_epi32(raw[B % 2], 8 * J + 4 * (B / 2)), 15, kNibbleBase);
  }
};

struct Bytes {
  static constexpr int kBytes = kQuadBytes8;
  U raw[4];

  LLMQAT_FN void load(const uint8_t* p) {
    for (int i = 0; i < 4; ++i)
      raw[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
  }
  LLMQAT_FN void skip_one() {
    for (int i = 0; i < 4; ++i) raw[i] = _mm256_srli_epi32(raw[i], 8);
  }
  template <int J, int B>
  LLMQAT_FN F value() const {
    return mantissa_code(_mm256_srli_epi32(raw[B], 8 * J), 255, kByteBase);
  }
};

}  // namespace avx2
#undef LLMQAT_FN

// ---- AVX-512 -----------------------------------------------------------------------------------

#define LLMQAT_FN LLMQAT_TARGET_AVX512 __attribute__((always_inline)) inline
namespace avx512 {

LLMQAT_FN F fused_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

template <class D>
LLMQAT_FN F rounded(F v) {
  if constexpr (!std::is_same_v<D, bf16>) return round_as<D>(v);
  const U u = _mm512_castps_si512(v), up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const U even = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  return _mm512_castsi512_ps(_mm512_and_si512(even, _mm512_set1_epi32(~0xFFFF)));
}

struct Nibbles {
  static constexpr int kBytes = kQuadBytes4;
  U raw;

  LLMQAT_FN void load(const uint8_t* p) { raw = _mm512_loadu_si512(p); }
  LLMQAT_FN void skip_one() { raw = _mm512_srli_epi32(raw, 8); }
  template <int J, int B>
  LLMQAT_FN F value() const {
    const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    constexpr int kShift = 8 * J + 4 * B;
    return _mm512_permutexvar_ps(kShift == 0 ? raw : _mm512_srli_epi32(raw, kShift), table);
  }
};

struct Bytes {
  static constexpr int kBytes = kQuadBytes8;
  U raw[2];

  LLMQAT_FN void load(const uint8_t* p) {
    raw[0] = _mm512_loadu_si512(p);
    raw[1] = _mm512_loadu_si512(p + 64);
  }
  LLMQAT_FN void skip_one() {
    raw[0] = _mm512_srli_epi32(raw[0], 8);
    raw[1] = _mm512_srli_epi32(raw[1], 8);
  }
  template <int J, int B>
  LLMQAT_FN F value() const {
    constexpr int kAndOr = 0xEA;  // (a & b) | c
    const U byte = J == 0 ? raw[B] : _mm512_srli_epi32(raw[B], 8 * J);
    const U wide = _mm512_ternarylogic_epi32(byte, _mm512_set1_epi32(255),
                                             _mm512_set1_epi32(kMantissaBits), kAndOr);
    return _mm512_sub_ps(_mm512_castsi512_ps(wide), _mm512_set1_ps(kByteBase));
  }
};

}  // namespace avx512
#undef LLMQAT_FN

}  // namespace llmqat::cpu
