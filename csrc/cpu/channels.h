// Channel groups over tokens on the CPU: fake_quantize_channels.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"
#include "parallel.h"

namespace llmqat::cpu {

// y = fake quantization of x [rows, columns] with one scale per `group` columns over all rows (spec
// 24). T is float, llmqat::bf16 or llmqat::fp16; group divides columns; y may be x.
template <class T>
void fake_quantize_channels(const Parallel& parallel, const T* x, int64_t rows, int64_t columns,
                            int64_t group, int bits, T* y);

}  // namespace llmqat::cpu
