// RMSNorm on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"
#include "row_output.h"

namespace llmqat::cpu {

// Floats of scratch that rms_norm_row needs for rows of n values.
inline int64_t rms_norm_scratch(int64_t n) { return (n + 15) / 16 * 16; }

// y = rms_norm(x) * weight (spec 12). With residual, total = x + residual is normalised instead of
// x; without, total is not written. T is float, llmqat::bf16 or llmqat::fp16. y may be x or total,
// total may be x.
template <class T>
void rms_norm_row(const T* x, const T* residual, const float* weight, int64_t n, float eps,
                  T* total, T* y, float* scratch);

// The same for rows of n values that follow one another.
template <class T>
void rms_norm_rows(const Parallel& parallel, const T* x, const T* residual, const float* weight,
                   int64_t rows, int64_t n, float eps, T* total, const RowOutput<T>& out);

}  // namespace llmqat::cpu
