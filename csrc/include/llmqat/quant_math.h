// The scalar formulas of docs/spec.md 1 to 5, and the 16-bit floats. Host and device; no torch.
//
// fp32, IEEE, round to nearest even, no contraction: the host side is compiled with
// -ffp-contract=off, the device side names each rounding (__fmul_rn, __fdiv_rn). Vector code in
// csrc/cpu must give these bits; it does so by the same operations in the same order.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LLMQAT_HD __host__ __device__ __forceinline__
#else
#define LLMQAT_HD inline
#endif

namespace llmqat {

// Storage types: the bits of a 16-bit float. All arithmetic is in fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline constexpr int kMinBits = 2;
inline constexpr int kMaxBits = 8;
// Integer scales of groups (spec 18): the largest, and the longest row whose sum fits int32, since
// 63 * 7 * 127 * 38342 < 2^31.
inline constexpr int kMaxMultiplier = 63;
inline constexpr int64_t kMaxIntegerGroupK = 38342;
inline constexpr float kTinyAmax = 0x1p-100f;  // rows below it have scale 1 and codes 0 (spec 2)
inline constexpr uint32_t kInfBits = 0x7F800000u;
inline constexpr uint32_t kAbsMask = 0x7FFFFFFFu;
// 1.5 * 2^23: adding it leaves rne(v) in the low mantissa bits for |v| < 2^22.
inline constexpr float kRoundMagic = 12582912.0f;
inline constexpr int32_t kRoundMagicBits = 0x4B400000;

LLMQAT_HD uint32_t float_bits(float v) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(v);
#else
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
#endif
}

LLMQAT_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
#endif
}

LLMQAT_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

LLMQAT_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LLMQAT_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// ---- 16-bit floats ----

LLMQAT_HD float to_float(float v) { return v; }

LLMQAT_HD float to_float(bf16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

LLMQAT_HD float to_float(fp16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // Inf, NaN (made quiet, payload kept: what vcvtph2ps does)
    const uint32_t payload = (magnitude & 0x3FFu) << 13;
    return bits_float(sign | kInfBits | payload | (payload != 0 ? 0x00400000u : 0u));
  }
  if (magnitude >= 0x0400u) {  // normal: rebias the exponent, 127 - 15 = 112
    return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  }
  // Zero and denormals: magnitude * 2^-24 is exact.
  return bits_float(sign | float_bits(mul_rn(static_cast<float>(magnitude), 0x1p-24f)));
#endif
}

LLMQAT_HD bf16 to_bf16(float v) {
  const uint32_t u = float_bits(v);
  if ((u & kAbsMask) > kInfBits) return bf16{0x7FC0u};
  return bf16{static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

LLMQAT_HD fp16 to_fp16(float v) {
  const uint32_t u = float_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & kAbsMask;
  if (magnitude > kInfBits) {  // NaN (made quiet, top of the payload kept: what vcvtps2ph does)
    return fp16{static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu))};
  }
  if (magnitude >= 0x477FF000u) return fp16{static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns the last fp16 bit (2^-24) with the last fp32 bit and rounds.
    const uint32_t rounded = float_bits(add_rn(bits_float(magnitude), 0.5f)) - 0x3F000000u;
    return fp16{static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return fp16{static_cast<uint16_t>(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13))};
}

template <class T>
LLMQAT_HD T from_float(float v);
template <>
LLMQAT_HD float from_float<float>(float v) {
  return v;
}
template <>
LLMQAT_HD bf16 from_float<bf16>(float v) {
  return to_bf16(v);
}
template <>
LLMQAT_HD fp16 from_float<fp16>(float v) {
  return to_fp16(v);
}

// round_d of the specification: to the dtype and back.
template <class T>
LLMQAT_HD float round_to(float v) {
  return to_float(from_float<T>(v));
}

// ---- quantization ----

LLMQAT_HD int qmax(int bits) { return (1 << (bits - 1)) - 1; }

// |x| of a row as an ordered integer: max over it finds amax, and anything >= kInfBits is not
// finite.
LLMQAT_HD uint32_t magnitude_bits(float v) { return float_bits(v) & kAbsMask; }

// What one row needs to make codes. inv is 0 for rows whose codes are all 0.
struct RowScale {
  float scale;  // spec 3, or NaN / 1 by spec 2
  float inv;    // spec 4
  bool zero;    // all codes are 0: skip the multiply (0 * Inf must not appear)
};

// Spec 2 and 3. amax_bits = max over the row of magnitude_bits(x).
LLMQAT_HD RowScale row_scale(uint32_t amax_bits, int bits, bool bf16_scale) {
  if (amax_bits >= kInfBits) return {bits_float(0x7FC00000u), 0.0f, true};
  const float amax = bits_float(amax_bits);
  if (amax < kTinyAmax) return {1.0f, 0.0f, true};
  float scale = div_rn(amax, static_cast<float>(qmax(bits)));
  if (bf16_scale) scale = round_to<bf16>(scale);
  return {scale, div_rn(1.0f, scale), false};
}

// Spec 4: one code. The clamp between the multiply and the rounding also stops contraction.
LLMQAT_HD int8_t quantize_code(float x, float inv, float limit) {
  float v = mul_rn(x, inv);
#if defined(__CUDA_ARCH__)
  v = fminf(fmaxf(v, -limit), limit);
#else
  v = v < -limit ? -limit : v;
  v = v > limit ? limit : v;
#endif
  const uint32_t rounded = float_bits(add_rn(v, kRoundMagic));
  return static_cast<int8_t>(static_cast<int32_t>(rounded) - kRoundMagicBits);
}

// Spec 5, before the cast.
LLMQAT_HD float dequantize_code(int8_t code, float scale) {
  return mul_rn(static_cast<float>(code), scale);
}

}  // namespace llmqat
