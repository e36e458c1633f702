// One vocabulary of fp32 lanes for three instruction sets: the types F (kLanes floats) and U
// (kLanes 32-bit words) and the functions on them, in the namespaces scalar (1 lane), avx2 (8) and
// avx512 (16).
//
// Elementwise functions are IEEE and give the same bits everywhere. `fma`, `sum` and `sum_each`
// depend on the lane count or on fusing: only for results under the 2x rule. Kernels built on this
// go through for_each_isa.h.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/vec.h"
#include "llmqat/fast_math.h"

// `return <namespace of the current instruction set>::call;`
#define LLMQAT_DISPATCH_ISA(call)                             \
  switch (::llmqat::cpu::current_isa()) {                     \
    case ::llmqat::cpu::Isa::avx512vnni: return avx512::call; \
    case ::llmqat::cpu::Isa::avx2: return avx2::call;         \
    default: return scalar::call;                             \
  }

namespace llmqat::cpu {

// Column of one row of a KV cache as a float, before its scale.
inline float cached_value(const int8_t* row, int64_t column) {
  return static_cast<float>(row[column]);
}
inline float cached_value(const uint8_t* row, int64_t column) {
  const uint32_t byte = row[column >> 1], above = 28 - 4 * (column & 1);
  return static_cast<float>(static_cast<int32_t>(byte << above) >> 28);  // sign from the top bit
}
template <class T>
float cached_value(const T* row, int64_t column) {
  return to_float(row[column]);
}

// ---- scalar
// ---------------------------------------------------------------------------------------

namespace scalar {

using F = float;
using U = uint32_t;
inline constexpr int kLanes = 1;

inline F set(float v) { return v; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F exp(F x) { return exp_f32(x); }
inline F where_positive(F condition, F v) { return condition > 0.0f ? v : 0.0f; }
inline F first_or(F v, int64_t n, float other) { return n > 0 ? v : other; }
inline bool any_nan(F v) { return v != v; }
inline bool any_finite(F v) { return magnitude_bits(v) < kInfBits; }
inline bool any_greater(F a, F b) { return a > b; }
inline float sum(F v) { return v; }
inline float max_lane(F v) { return v; }
inline F sum_each(const F* v) { return v[0]; }
inline F load(const float* p) { return *p; }
inline void store(float* p, F v) { *p = v; }
template <class T>
F load_first(const T* p, int64_t) {
  return to_float(*p);
}
template <class T>
void store_first(T* p, int64_t, F v) {
  *p = from_float<T>(v);
}
template <class T>
F round_as(F v) {
  return round_to<T>(v);
}
template <class C>
F load_cached(const C* row, int64_t column) {
  return cached_value(row, column);
}

inline U set_u(uint32_t v) { return v; }
inline U iota_u(uint32_t first) { return first; }
inline U xor_u(U a, U b, U c) { return a ^ b ^ c; }
inline U max_u(U a, U b) { return a > b ? a : b; }
inline void store_u(uint32_t* p, U v) { *p = v; }
inline uint32_t max_lane_u(U v) { return v; }
inline void multiply_u(U a, uint32_t b, U& high, U& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<U>(product >> 32);
  low = static_cast<U>(product);
}

}  // namespace scalar

// ---- AVX2
// -----------------------------------------------------------------------------------------

#define LLMQAT_FN LLMQAT_TARGET_AVX2 inline
namespace avx2 {

using F = __m256;
using U = __m256i;

LLMQAT_FN F set(float v) { return _mm256_set1_ps(v); }
LLMQAT_FN F add(F a, F b) { return _mm256_add_ps(a, b); }
LLMQAT_FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
LLMQAT_FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
LLMQAT_FN F div(F a, F b) { return _mm256_div_ps(a, b); }
LLMQAT_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
LLMQAT_FN F max(F a, F b) { return _mm256_max_ps(a, b); }
LLMQAT_FN F min(F a, F b) { return _mm256_min_ps(a, b); }
LLMQAT_FN F horner(F p, F x, float c) { return add(mul(p, x), set(c)); }

LLMQAT_FN F exp(F x) {
  const F safe =
      _mm256_min_ps(_mm256_max_ps(x, set(kExpLow)), set(kExpHigh));  // NaN becomes kExpLow
  const F n =
      _mm256_round_ps(mul(safe, set(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = sub(sub(safe, mul(n, set(kLn2Hi))), mul(n, set(kLn2Lo)));
  F p = horner(set(kExp6), r, kExp5);
  p = horner(p, r, kExp4);
  p = horner(p, r, kExp3);
  p = horner(p, r, kExp2);
  p = horner(p, r, 1.0f);
  p = horner(p, r, 1.0f);
  const U power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  p = mul(p, _mm256_castsi256_ps(power));
  p = _mm256_andnot_ps(_mm256_cmp_ps(x, set(kExpLow), _CMP_LT_OQ), p);
  p = _mm256_blendv_ps(p, set(bits_float(kInfBits)), _mm256_cmp_ps(x, set(kExpHigh), _CMP_GT_OQ));
  return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

LLMQAT_FN F where_positive(F condition, F v) {
  return _mm256_and_ps(_mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_GT_OQ), v);
}

LLMQAT_FN F first_or(F v, int64_t n, float other) {
  const U lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const U keep =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < kLanes ? n : kLanes)), lane);
  return _mm256_blendv_ps(set(other), v, _mm256_castsi256_ps(keep));
}

LLMQAT_FN bool any_nan(F v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
LLMQAT_FN bool any_finite(F v) {
  const F magnitude = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(kAbsMask)));
  return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, set(bits_float(kInfBits)), _CMP_LT_OQ)) != 0;
}
LLMQAT_FN bool any_greater(F a, F b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

LLMQAT_FN float sum(F v) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

LLMQAT_FN float max_lane(F v) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

LLMQAT_FN F add_pairs(F a, F b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
LLMQAT_FN F add_quads(F a, F b) {
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
             _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
// Lane i is the sum of v[i]; kLanes vectors.
LLMQAT_FN F sum_each(const F* v) {
  const F a = add_quads(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]));
  const F b = add_quads(add_pairs(v[4], v[5]), add_pairs(v[6], v[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// The first n values (all for n >= kLanes), 0 in the other lanes.
template <class T>
LLMQAT_FN F load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T all[kLanes] = {};
  std::memcpy(all, p, static_cast<size_t>(n) * sizeof(T));
  return load(all);
}

template <class T>
LLMQAT_FN void store_first(T* p, int64_t n, F v) {
  if (n >= kLanes) return store(p, v);
  T all[kLanes];
  store(all, v);
  std::memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
LLMQAT_FN F round_as(F v) {
  if constexpr (std::is_same_v<T, float>) return v;
  if constexpr (std::is_same_v<T, fp16>) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  const U u = _mm256_castps_si256(v);
  const U odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const U up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const F rounded =
      _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  return _mm256_blendv_ps(rounded, set(bits_float(0x7FC00000u)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

template <class T>
LLMQAT_FN F load_cached(const T* row, int64_t column) {
  return load(row + column);
}
LLMQAT_FN F load_cached(const int8_t* row, int64_t column) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
// Byte to qword; its low word keeps the low nibble on top of x << 28, its high word gets the high
// one.
LLMQAT_FN F load_cached(const uint8_t* row, int64_t column) {
  int32_t four;
  std::memcpy(&four, row + column / 2, sizeof four);
  const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i both = _mm256_or_si256(wide, _mm256_slli_epi64(wide, 28));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 28), 28));
}

LLMQAT_FN U set_u(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
LLMQAT_FN U iota_u(uint32_t first) {
  return _mm256_add_epi32(set_u(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LLMQAT_FN U xor_u(U a, U b, U c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
LLMQAT_FN U max_u(U a, U b) { return _mm256_max_epu32(a, b); }
LLMQAT_FN void store_u(uint32_t* p, U v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
LLMQAT_FN uint32_t max_lane_u(U v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
LLMQAT_FN void multiply_u(U a, uint32_t b, U& high, U& low) {
  const U even = _mm256_mul_epu32(a, set_u(b)),
          odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), set_u(b));
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

}  // namespace avx2
#undef LLMQAT_FN

// ---- AVX-512
// --------------------------------------------------------------------------------------

#define LLMQAT_FN LLMQAT_TARGET_AVX512 inline
namespace avx512 {

using F = __m512;
using U = __m512i;

LLMQAT_FN F set(float v) { return _mm512_set1_ps(v); }
LLMQAT_FN F add(F a, F b) { return _mm512_add_ps(a, b); }
LLMQAT_FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }
LLMQAT_FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }
LLMQAT_FN F div(F a, F b) { return _mm512_div_ps(a, b); }
LLMQAT_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
LLMQAT_FN F max(F a, F b) { return _mm512_max_ps(a, b); }
LLMQAT_FN F min(F a, F b) { return _mm512_min_ps(a, b); }
LLMQAT_FN F horner(F p, F x, float c) { return add(mul(p, x), set(c)); }
LLMQAT_FN F load(const float* p) { return _mm512_loadu_ps(p); }
LLMQAT_FN void store(float* p, F v) { _mm512_storeu_ps(p, v); }

LLMQAT_FN F exp(F x) {
  const F safe =
      _mm512_min_ps(_mm512_max_ps(x, set(kExpLow)), set(kExpHigh));  // NaN becomes kExpLow
  const F n =
      _mm512_roundscale_ps(mul(safe, set(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = sub(sub(safe, mul(n, set(kLn2Hi))), mul(n, set(kLn2Lo)));
  F p = horner(set(kExp6), r, kExp5);
  p = horner(p, r, kExp4);
  p = horner(p, r, kExp3);
  p = horner(p, r, kExp2);
  p = horner(p, r, 1.0f);
  p = horner(p, r, 1.0f);
  const U power =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  p = mul(p, _mm512_castsi512_ps(power));
  p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, set(kExpLow), _CMP_LT_OQ), _mm512_setzero_ps());
  p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, set(kExpHigh), _CMP_GT_OQ),
                         set(bits_float(kInfBits)));
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

LLMQAT_FN F where_positive(F condition, F v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_GT_OQ), v);
}
LLMQAT_FN F first_or(F v, int64_t n, float other) {
  return _mm512_mask_mov_ps(set(other), n > 0 ? lanes(n) : __mmask16{0}, v);
}
LLMQAT_FN bool any_nan(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
LLMQAT_FN bool any_finite(F v) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(v), set(bits_float(kInfBits)), _CMP_LT_OQ) != 0;
}
LLMQAT_FN bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
LLMQAT_FN float sum(F v) { return _mm512_reduce_add_ps(v); }
LLMQAT_FN float max_lane(F v) { return _mm512_reduce_max_ps(v); }

LLMQAT_FN F add_pairs(F a, F b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
LLMQAT_FN F add_quads(F a, F b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
// Adds neighbouring 128-bit quarters of (a, b).
LLMQAT_FN F add_quarters(F a, F b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
LLMQAT_FN F sum_four(const F* v) { return add_quads(add_pairs(v[0], v[1]), add_pairs(v[2], v[3])); }
// Lane i is the sum of v[i]; kLanes vectors.
LLMQAT_FN F sum_each(const F* v) {
  const F low = add_quarters(sum_four(v), sum_four(v + 4));
  const F high = add_quarters(sum_four(v + 8), sum_four(v + 12));
  return add_quarters(low, high);
}

// The first n values (all for n >= kLanes), 0 in the other lanes.
template <class T>
LLMQAT_FN F load_first(const T* p, int64_t n) {
  return load(p, lanes(n));
}
template <class T>
LLMQAT_FN void store_first(T* p, int64_t n, F v) {
  store(p, lanes(n), v);
}

template <class T>
LLMQAT_FN F round_as(F v) {
  if constexpr (std::is_same_v<T, float>) return v;
  if constexpr (std::is_same_v<T, fp16>) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  const U u = _mm512_castps_si512(v);
  const U odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const U up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const F rounded =
      _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  return _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                            set(bits_float(0x7FC00000u)));
}

template <class T>
LLMQAT_FN F load_cached(const T* row, int64_t column) {
  return load(row + column, __mmask16{0xFFFF});
}
LLMQAT_FN F load_cached(const int8_t* row, int64_t column) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + column));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// Byte to qword; its low word keeps the low nibble on top of x << 28, its high word gets the high
// one.
LLMQAT_FN F load_cached(const uint8_t* row, int64_t column) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column / 2));
  const __m512i wide = _mm512_cvtepu8_epi64(eight);
  const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 28), 28));
}

LLMQAT_FN U set_u(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
LLMQAT_FN U iota_u(uint32_t first) {
  return _mm512_add_epi32(set_u(first),
                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
LLMQAT_FN U xor_u(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
LLMQAT_FN U max_u(U a, U b) { return _mm512_max_epu32(a, b); }
LLMQAT_FN void store_u(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }
LLMQAT_FN uint32_t max_lane_u(U v) { return _mm512_reduce_max_epu32(v); }
LLMQAT_FN void multiply_u(U a, uint32_t b, U& high, U& low) {
  // Shuffles, not shifts: those would share the one port of the multiplier.
  const U even = _mm512_mul_epu32(a, set_u(b));
  const U odd = _mm512_mul_epu32(_mm512_shuffle_epi32(a, _MM_PERM_DDBB), set_u(b));
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}

}  // namespace avx512
#undef LLMQAT_FN

}  // namespace llmqat::cpu
