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

template void silu_mul_row<float>(const float*, const float*, int64_t, float*);
template void silu_mul_row<bf16>(const bf16*, const bf16*, int64_t, bf16*);
template void silu_mul_row<fp16>(const fp16*, const fp16*, int64_t, fp16*);

}  // namespace llmqat::cpu
