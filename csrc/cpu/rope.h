// Rotary embedding of the heads of one token on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat::cpu {

// Rotates heads x head_dim values by the fp32 table rows cos, sin [head_dim / 2] (spec 9). T is
// float, llmqat::bf16 or llmqat::fp16. out is not x.
template <class T>
void rope_heads(const T* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin,
                T* out);

}  // namespace llmqat::cpu
