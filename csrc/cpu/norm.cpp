// RMSNorm of one row, with the residual addition in front.
//
// Math:     spec 12, tree_sum of spec 11.
// Shapes:   one row of n values a call; quantize_row follows on a row that is still in L1.
// Dtypes:   fp32, bf16, fp16 in and out; fp32 weight (the binding widens it) and arithmetic.
// Tiling:   none; a row and its squares (8n bytes) stay in L1 for n <= 4096.
// Cost:     two passes of loads and stores and one of adds over n floats in L1.
// Numerics: exact. The sum is a tree over halves: elementwise adds, so lane counts do not matter.
// Edges:    n = 0 writes nothing; NaN and Inf go through to y.
// Limits:   MXCSR at its default.
// Tests:    tests/kernels/test_rms_norm_quantize_spec.py
// Bench:    python -m benchmarks.run --op rms_norm_quantize
#include "cpu/norm.h"

#include <bit>
#include <cmath>

#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/norm_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

template <class T>
void rms_norm_row(const T* x, const T* residual, const float* weight, int64_t n, float eps,
                  T* total, T* y, float* scratch) {
  LLMQAT_DISPATCH_ISA(rms_norm_row(x, residual, weight, n, eps, total, y, scratch))
}

template <class T>
void rms_norm_rows(const Parallel& parallel, const T* x, const T* residual, const float* weight,
                   int64_t rows, int64_t n, float eps, T* total, const RowOutput<T>& out) {
  produce_rows(parallel, out, rows, n, [&](int64_t r, T* y) {
    thread_local Scratch<float> t_squares;
    const int64_t at = r * n;
    rms_norm_row(x + at, residual == nullptr ? nullptr : residual + at, weight, n, eps,
                 total == nullptr ? nullptr : total + at, y, t_squares.get(rms_norm_scratch(n)));
  });
}

#define LLMQAT_INSTANTIATE(T)                                                                      \
  template void rms_norm_row<T>(const T*, const T*, const float*, int64_t, float, T*, T*, float*); \
  template void rms_norm_rows<T>(const Parallel&, const T*, const T*, const float*, int64_t,       \
                                 int64_t, float, T*, const RowOutput<T>&);
LLMQAT_INSTANTIATE(float) LLMQAT_INSTANTIATE(bf16) LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
