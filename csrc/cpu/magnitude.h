// Magnitudes of stored values as integers, which order like |x|: an integer maximum is order-free,
// and Inf and NaN come out on top (spec 2).
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat::cpu {

inline uint32_t stored_magnitude(float v) { return magnitude_bits(v); }
template <class T>
uint32_t stored_magnitude(T v) {
  return v.bits & 0x7FFFu;
}

// A largest stored magnitude as the fp32 bits of |x|, which row_scale takes.
inline uint32_t widen_amax(uint32_t amax, const float*) { return amax; }
inline uint32_t widen_amax(uint32_t amax, const bf16*) { return amax << 16; }
inline uint32_t widen_amax(uint32_t amax, const fp16*) {
  return float_bits(to_float(fp16{static_cast<uint16_t>(amax)}));
}

}  // namespace llmqat::cpu
