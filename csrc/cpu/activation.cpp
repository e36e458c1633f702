// SiLU(gate) * up of one row.
//
// Math:     spec 14, exp of spec 13.
// Shapes:   one row of n values a call; quantize_row follows on a row that is still in L1.
// Dtypes:   fp32, bf16, fp16 in and out; fp32 arithmetic.
// Tiling:   none.
// Cost:     about 30 instructions for 16 values (AVX-512). Bound: arithmetic.
// Numerics: exact: multiplies and adds of the polynomial are separate roundings.
// Edges:    g < -88 gives -0 (the exponential is inf), g = -inf NaN, NaN NaN.
// Limits:   MXCSR at its default.
// Tests:    tests/kernels/test_silu_mul_quantize_spec.py
// Bench:    python -m benchmarks.run --op silu_mul_quantize
#include "cpu/activation.h"

#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/activation_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t n, T* y) {
  LLMQAT_DISPATCH_ISA(silu_mul_row(gate, up, n, y))
}

template <class T>
void silu_mul_rows(const Parallel& parallel, const T* gate, const T* up, int64_t stride,
                   int64_t rows, int64_t n, const RowOutput<T>& out) {
  produce_rows(parallel, out, rows, n,
               [&](int64_t r, T* y) { silu_mul_row(gate + r * stride, up + r * stride, n, y); });
}

#define LLMQAT_INSTANTIATE(T)                                                                    \
  template void silu_mul_row<T>(const T*, const T*, int64_t, T*);                                \
  template void silu_mul_rows<T>(const Parallel&, const T*, const T*, int64_t, int64_t, int64_t, \
                                 const RowOutput<T>&);
LLMQAT_INSTANTIATE(float) LLMQAT_INSTANTIATE(bf16) LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
