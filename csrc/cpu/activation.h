// SiLU(gate) * up on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"
#include "row_output.h"

namespace llmqat::cpu {

// y = silu(gate) * up (spec 14). T is float, llmqat::bf16 or llmqat::fp16. y may be gate or up.
template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t n, T* y);

// The same for rows of n values that begin `stride` values apart.
template <class T>
void silu_mul_rows(const Parallel& parallel, const T* gate, const T* up, int64_t stride,
                   int64_t rows, int64_t n, const RowOutput<T>& out);

}  // namespace llmqat::cpu
