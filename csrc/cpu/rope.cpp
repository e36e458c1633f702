// Rotary embedding of one token: the query of a step, or K on its way into the cache.
//
// Math:     spec 9.
// Shapes:   heads x head_dim values a call, halves rotated against each other; any even head_dim.
// Dtypes:   fp32, bf16, fp16 in and out; fp32 tables, rounded to the dtype here.
// Tiling:   columns outside, heads inside: a table row is loaded and rounded once.
// Cost:     memory-bound: reads and writes the heads once.
// Numerics: exact: every product and sum is rounded to the dtype.
// Edges:    NaN and Inf go through.
// Limits:   out must not overlap x.
// Tests:    tests/kernels/test_rope_quantize_append_spec.py
// Bench:    python -m benchmarks.run --op rope_quantize_append
#include "cpu/rope.h"

#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/rope_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

template <class T>
void rope_heads(const T* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin,
                T* out){LLMQAT_DISPATCH_ISA(rope_heads(x, heads, head_dim, cos, sin, out))}

#define LLMQAT_INSTANTIATE(T) \
  template void rope_heads<T>(const T*, int64_t, int64_t, const float*, const float*, T*);
LLMQAT_INSTANTIATE(float) LLMQAT_INSTANTIATE(bf16) LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
