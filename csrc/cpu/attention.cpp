// Attention over one head of the KV cache: decode steps and prefill.
//
// Math:     spec 9. s_t = k_scale_t * (scaling * q . k_t), online softmax,
//           y = sum_t (p_t * v_scale_t) v_t / sum_t p_t.
// Shapes:   up to 32 (query, head) rows that read the same cached head: the query heads of a GQA
//           group, and the queries of one slot in a prefill. Any even head_dim; multiples of 16
//           (rotated: 32) run in whole vectors.
// Dtypes:   q, out fp32, bf16, fp16; cache int8, packed int4, fp32, bf16, fp16; fp32 arithmetic.
// Tiling:   blocks of 64 tokens: K and V as fp32 rows (2 x 16 KiB at head_dim 64) and the scores
//           stay near L1; groups of 4 rows share each loaded vector; 4 x 4 sums fill half of
//           the registers, the other half holds what they read.
// Cost:     head_dim 64, 3 heads a group, int8: about 60 vector instructions a token and KV head.
// Numerics: 2x rule. Neither the arithmetic nor the bits of a row depend on the other rows.
// Edges:    length 0 gives 0; a NaN scale within the length gives NaN; nothing past a row's own
//           length enters its result.
// Limits:   offsets and lengths were checked by the binding.
// Tests:    tests/kernels/test_attention_decode_spec.py
// Bench:    python -m benchmarks.run --op attention_decode
#include "cpu/attention.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/attention_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

template <class T, class C>
void attend(const CachedHead<C>& cache, const T* q, const int64_t* offsets, const int64_t* lengths,
            int64_t rows, float scaling, T* out, float* scratch){
    LLMQAT_DISPATCH_ISA(attend(cache, q, offsets, lengths, rows, scaling, out, scratch))}

#define LLMQAT_INSTANTIATE(T, C)                                                             \
  template void attend<T, C>(const CachedHead<C>&, const T*, const int64_t*, const int64_t*, \
                             int64_t, float, T*, float*);
#define LLMQAT_INSTANTIATE_ALL(T) \
  LLMQAT_INSTANTIATE(T, int8_t)   \
  LLMQAT_INSTANTIATE(T, uint8_t)  \
  LLMQAT_INSTANTIATE(T, float)    \
  LLMQAT_INSTANTIATE(T, bf16)     \
  LLMQAT_INSTANTIATE(T, fp16)
LLMQAT_INSTANTIATE_ALL(float) LLMQAT_INSTANTIATE_ALL(bf16) LLMQAT_INSTANTIATE_ALL(fp16)
#undef LLMQAT_INSTANTIATE_ALL
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
