// SiLU(gate) * up of one row on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat::cpu {

// y = silu(gate) * up (spec 14). T is float, llmqat::bf16 or llmqat::fp16. y may be gate or up.
template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t n, T* y);

}  // namespace llmqat::cpu
