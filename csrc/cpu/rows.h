// Row operators on the CPU: quantize, dequantize, fake_quantize and its backward.
//
// Math: docs/spec.md 1-6. Pointers need no alignment beyond their type's. T is float, llmqat::bf16
// or llmqat::fp16. Each function picks the instruction set by current_isa(); all give the same
// bits.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"
#include "parallel.h"

namespace llmqat::cpu {

// max |x| of n values as the bits of an fp32 number; Inf and NaN come out on top. 0 if n == 0.
template <class T>
uint32_t amax_bits_of_row(const T* x, int64_t n);

// n values times inv, rounded to codes (spec 4). The row has codes (RowScale::zero is false).
template <class T>
void codes_of_row(const T* x, int64_t n, float inv, int bits, int8_t* codes);

// One row of n values to n codes; returns the scale (spec 2-4). codes may be nullptr only if n ==
// 0.
template <class T>
float quantize_row(const T* x, int64_t n, int bits, bool bf16_scale, int8_t* codes);

// The same for `rows` rows of n values that follow one another.
template <class T>
void quantize_rows(const Parallel& parallel, const T* x, int64_t rows, int64_t n, int bits,
                   bool bf16_scale, int8_t* codes, float* scale);

// n codes times one scale, cast to T (spec 5).
template <class T>
void dequantize_row(const int8_t* codes, int64_t n, float scale, T* out);

// dequantize_row(quantize_row(x)) without storing the codes. out may be x.
template <class T>
void fake_quantize_row(const T* x, int64_t n, int bits, bool bf16_scale, T* out);

// out = |x| < clip ? grad : 0 (spec 6; a NaN x stops the gradient).
template <class T>
void mask_gradient(const T* grad, const T* x, int64_t n, float clip, T* out);

}  // namespace llmqat::cpu
