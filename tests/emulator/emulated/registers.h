// The instructions that one thread does on its own registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "llmqat/quant_math.h"

namespace llmqat {
namespace emulated {

// A double to the nearest value with kMantissa bits, half to even, not below 2^kLowest: exact
// scaling, so that nearbyint does the only rounding.
inline float round_double(double v, int mantissa, int lowest) {
  if (v == 0.0 || !std::isfinite(v)) return static_cast<float>(v);
  const int exponent = std::max(std::ilogb(v) - mantissa + 1, lowest);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(v, -exponent)), exponent));
}

// a * b + c of bf16 or fp16 values, rounded once. The product is exact in a double; the sum is made
// odd where it is not exact, so that rounding it again goes the right way.
inline double fused(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (c - back);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (lost == 0.0 || (bits & 1) != 0) return sum;
  return std::nextafter(sum, lost > 0.0 ? INFINITY : -INFINITY);
}

inline constexpr uint16_t kNan16 = 0x7FFF;  // what the device gives for every NaN

inline uint16_t fma_fp16(uint16_t a, uint16_t b, uint16_t c) {
  const double v = fused(to_float(fp16{a}), to_float(fp16{b}), to_float(fp16{c}));
  return std::isnan(v) ? kNan16 : to_fp16(round_double(v, 11, -24)).bits;
}

inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  const double v = fused(to_float(bf16{a}), to_float(bf16{b}), to_float(bf16{c}));
  return std::isnan(v) ? kNan16 : to_bf16(round_double(v, 8, -133)).bits;
}

template <class F>
uint32_t each_half(F f, uint32_t a, uint32_t b, uint32_t c) {
  const auto part = [&](int shift) {
    return static_cast<uint32_t>(f(static_cast<uint16_t>(a >> shift),
                                   static_cast<uint16_t>(b >> shift),
                                   static_cast<uint16_t>(c >> shift)));
  };
  return part(0) | part(16) << 16;
}

inline constexpr uint32_t kOnes = 0x3C003C00u, kMinusOnes = 0xBC00BC00u;  // fp16
inline constexpr uint32_t kMinusZeros = 0x80008000u;                      // fp16 and bf16

}  // namespace emulated

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7))) & 0xFFu;
    if ((pick & 8) != 0) byte = (byte & 0x80u) != 0 ? 0xFFu : 0u;
    d |= byte << (8 * i);
  }
  return d;
}

template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256);
  uint32_t d = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    d |= (static_cast<uint32_t>(kTable) >> row & 1) << i;
  }
  return d;
}

inline int32_t dot4_s8(uint32_t a, uint32_t b, int32_t c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; ++i) {
    const int32_t x = static_cast<int8_t>(a >> (8 * i)), y = static_cast<int8_t>(b >> (8 * i));
    sum += static_cast<uint32_t>(x * y);
  }
  return static_cast<int32_t>(sum);
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return emulated::each_half(emulated::fma_fp16, a, b, c);
}
inline uint32_t half2_mul(uint32_t a, uint32_t b) { return half2_fma(a, b, emulated::kMinusZeros); }
inline uint32_t half2_add(uint32_t a, uint32_t b) { return half2_fma(a, emulated::kOnes, b); }
inline uint32_t half2_sub(uint32_t a, uint32_t b) { return half2_fma(b, emulated::kMinusOnes, a); }

inline uint32_t half2_neg(uint32_t a) { return a ^ 0x80008000u; }
inline uint32_t half2_pack(float low, float high) {
  return to_fp16(low).bits | static_cast<uint32_t>(to_fp16(high).bits) << 16;
}

inline uint32_t bf162_fma(uint32_t a, uint32_t b, uint32_t c) {
  return emulated::each_half(emulated::fma_bf16, a, b, c);
}
inline uint32_t bf162_mul(uint32_t a, uint32_t b) { return bf162_fma(a, b, emulated::kMinusZeros); }

inline float exp2_approx(float v) { return std::exp2(v); }

}  // namespace llmqat
