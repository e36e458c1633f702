// exp and log of docs/spec.md 13, one value at a time. Host and device; no torch.
//
// Twin of llmqat_kernels/spec/math.py: the same coefficients and the same rounded operations in the
// same order, so the same bits. Nothing here may be contracted to an FMA.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2Hi = 0.693359375f;  // 9 bits: n * kLn2Hi is exact
inline constexpr float kLn2Lo = -2.1219444005469057e-4f;
inline constexpr float kExpLow = -87.0f, kExpHigh = 88.0f;
inline constexpr int32_t kSqrtHalfBits = 0x3F3504F3;

// e^r on |r| <= ln(2) / 2, by falling degree; the last two coefficients are 1.
inline constexpr float kExp6 = 1.381453825160861e-3f, kExp5 = 8.36874544620514e-3f,
                       kExp4 = 4.166838899254799e-2f, kExp3 = 1.666652113199234e-1f,
                       kExp2 = 4.999999403953552e-1f;

// (log(1 + f) - f + f^2 / 2) / f^3, by falling degree.
inline constexpr float kLog7 = -7.634429633617401e-2f, kLog6 = 1.2761549651622772e-1f,
                       kLog5 = -1.31601944565773e-1f, kLog4 = 1.4201761782169342e-1f,
                       kLog3 = -1.6623356938362122e-1f, kLog2 = 2.0001226663589478e-1f,
                       kLog1 = -2.50008225440979e-1f, kLog0 = 3.333333134651184e-1f;

// One Horner step: two roundings.
LLMQAT_HD float horner(float p, float x, float c) { return add_rn(mul_rn(p, x), c); }

LLMQAT_HD float exp_f32(float x) {
  if (x < kExpLow) return 0.0f;
  if (x > kExpHigh) return bits_float(kInfBits);
  if (x != x) return x;
  const float n = add_rn(add_rn(mul_rn(x, kLog2e), kRoundMagic), -kRoundMagic);  // rne: |n| < 2^22
  float r = add_rn(x, -mul_rn(n, kLn2Hi));
  r = add_rn(r, -mul_rn(n, kLn2Lo));
  float p = horner(kExp6, r, kExp5);
  p = horner(p, r, kExp4);
  p = horner(p, r, kExp3);
  p = horner(p, r, kExp2);
  p = horner(p, r, 1.0f);
  p = horner(p, r, 1.0f);
  return mul_rn(p, bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
}

// Positive normal x only.
LLMQAT_HD float log_f32(float x) {
  const int32_t bits = static_cast<int32_t>(float_bits(x));
  const int32_t e = (bits - kSqrtHalfBits) >> 23;
  const float f = add_rn(bits_float(static_cast<uint32_t>(bits - e * (1 << 23))), -1.0f);
  const float exponent = static_cast<float>(e);
  const float z = mul_rn(f, f);
  float p = horner(kLog7, f, kLog6);
  p = horner(p, f, kLog5);
  p = horner(p, f, kLog4);
  p = horner(p, f, kLog3);
  p = horner(p, f, kLog2);
  p = horner(p, f, kLog1);
  p = horner(p, f, kLog0);
  float y = mul_rn(mul_rn(f, z), p);
  y = add_rn(y, mul_rn(exponent, kLn2Lo));
  y = add_rn(y, -mul_rn(0.5f, z));
  y = add_rn(f, y);
  return add_rn(y, mul_rn(exponent, kLn2Hi));
}

}  // namespace llmqat
