// attention_decode: picks the kernel, adds the partial sums of the splits, quantizes the rows.
//
// Math:     spec 9: out[d] = sum_s f_s sums_s[d] / sum_s f_s total_s, f_s = e^(top_s - top). Codes:
//           spec 1-4 of the row of all heads, as rounded to the dtype of the model.
// Shapes:   partial sums: attention_args.cuh; out [n, H, D], codes [n, H * D], scale [n].
// Dtypes:   partial sums fp32; out fp32, fp16, bf16; codes int8.
// Tiling:   a block adds one query head, a thread a column. With codes: the last block of a query
//           to arrive (a ticket, cleared by the splits) reads the row again, from L2, and quantizes
//           it. One block a query would be simpler, but a long context at batch 1 would then read
//           all of its partial sums through one multiprocessor: 1 MB at 16k tokens of 32 heads,
//           11 us.
// Cost:     one read of the partial sums, from L2; latency-bound.
// Numerics: splits in ascending order; exp of spec 13. Codes are bit-equal to quantize(out).
// Edges:    length 0 gives 0, codes 0 and scale 1; a slot or length outside the cache gives NaN.
// Limits:   n * splits < 2^31, H <= 65535, D even.
// Tests:    tests/emulator/test_attention_decode.py
// Bench:    python -m benchmarks.run --op attention_decode --device cuda
#include <algorithm>
#include <climits>

#include "cuda/attention_args.cuh"
#include "llmqat/fast_math.h"
#include "llmqat/reduce.cuh"

namespace llmqat {
namespace {

constexpr int kCombineThreads = 128;  // a column of a 128-wide head each

LLMQAT_DEVICE void store_float(void* y, int dtype, int64_t i, float v) {
  if (dtype == LLMQAT_FLOAT32) {
    static_cast<float*>(y)[i] = v;
  } else if (dtype == LLMQAT_BFLOAT16) {
    static_cast<bf16*>(y)[i] = to_bf16(v);
  } else {
    static_cast<fp16*>(y)[i] = to_fp16(v);
  }
}

// The row of one query, of which every value has been written by now.
LLMQAT_DEVICE void quantize_output(const AttentionArgs& args, int query) {
  const int64_t columns = args.p.heads * args.cache.head_dim, first = query * columns;
  uint32_t largest = 0;
  for (int64_t c = threadIdx.x; c < columns; c += kCombineThreads) {
    const uint32_t m = magnitude_bits(load_float(args.p.out, args.p.dtype, first + c));
    largest = m > largest ? m : largest;
  }
  const RowScale row = row_scale(row_max_u32(largest), args.p.quantize_bits, false);
  const float limit = static_cast<float>(qmax(args.p.quantize_bits));
  if (threadIdx.x == 0) args.p.codes_scale[query] = row.scale;
  for (int64_t c = threadIdx.x; c < columns; c += kCombineThreads) {
    const float v = load_float(args.p.out, args.p.dtype, first + c);
    args.p.codes[first + c] = row.zero ? int8_t{0} : quantize_code(v, row.inv, limit);
  }
}

LLMQAT_KERNEL(kCombineThreads)
combine_kernel(AttentionArgs args) {
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  float* const factors = reinterpret_cast<float*>(shared);  // [threads]
  float* const totals = factors + kCombineThreads;          // [threads]
  float* const tops = totals + kCombineThreads;             // [warps]
  uint32_t* const arrived = reinterpret_cast<uint32_t*>(tops + kCombineThreads / 32);
  const int query = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const QueryRange range = query_range(args, query);
  const int splits = (range.length + kAttentionSplit - 1) / kAttentionSplit;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t dim = args.cache.head_dim;

  float top = bits_float(kInfBits | 0x80000000u);
  for (int s = thread; s < splits; s += kCombineThreads) {
    top = fmaxf(top, *partial_of(args, query, head, s).top);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
  if (thread % 32 == 0) tops[thread / 32] = top;
  sync_block();
  for (int i = 0; i < kCombineThreads / 32; ++i) top = fmaxf(top, tops[i]);

  for (int64_t base = 0; base < dim; base += kCombineThreads) {
    const int64_t column = base + thread;
    float sum = 0.0f, total = 0.0f;
    for (int from = 0; from < splits; from += kCombineThreads) {
      const int chunk = splits - from < kCombineThreads ? splits - from : kCombineThreads;
      if (thread < chunk) {
        const Partial part = partial_of(args, query, head, from + thread);
        const float factor = exp_f32(*part.top - top);
        factors[thread] = factor;
        totals[thread] = factor * *part.total;
      }
      sync_block();
      const float* sums = partial_of(args, query, head, from).sums + column;
      for (int s = 0; s < chunk; ++s, sums += dim) {
        total += totals[s];
        if (column < dim) sum += factors[s] * *sums;
      }
      sync_block();  // before the factors are overwritten
    }
    const float empty = range.inside ? 0.0f : bits_float(0x7FC00000u);
    if (column < dim) {
      store_float(args.p.out, args.p.dtype, (query * args.p.heads + head) * dim + column,
                  splits > 0 ? div_rn(sum, total) : empty);
    }
  }
  if (args.p.codes == nullptr) return;

  thread_fence();
  sync_block();  // every value of this head is out
  if (thread == 0) *arrived = atomic_add_u32(args.p.tickets + query, 1u);
  sync_block();
  if (*arrived + 1 != static_cast<uint32_t>(args.p.heads)) return;
  thread_fence();
  quantize_output(args, query);
}

}  // namespace

int launch_attention_combine(const AttentionArgs& args, void* stream) {
  const size_t bytes = (2 * kCombineThreads + kCombineThreads / 32 + 1) * sizeof(float);
  const dim3 grid(static_cast<unsigned>(args.p.n), static_cast<unsigned>(args.p.heads));
  LLMQAT_LAUNCH_SHARED(combine_kernel, grid, dim3(kCombineThreads), bytes, stream, args);
  return cudaGetLastError();
}

namespace {

bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool fits(const LlmqatKvCache& cache, const LlmqatAttention& p, int64_t splits) {
  constexpr int64_t kMaxGridY = 65535;
  return p.n * splits < INT_MAX && p.heads <= kMaxGridY && cache.slots <= INT_MAX &&
         p.max_length < INT_MAX - kAttentionSplit && cache.head_dim <= 1024;
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_attention_decode(const LlmqatKvCache* cache,
                                            const LlmqatAttention* problem,
                                            const LlmqatRopeTables* tables, void* stream) {
  using namespace llmqat;
  if (problem->n == 0 || problem->heads == 0 || cache->head_dim == 0) return cudaSuccess;
  // At least one: the split kernels clear the tickets.
  const int64_t splits = std::max<int64_t>(1, attention_splits(problem->max_length));
  if (!fits(*cache, *problem, splits)) return cudaErrorInvalidValue;
  const int64_t row = cache->storage == LLMQAT_KV_INT4 ? cache->head_dim / 2 : cache->head_dim;
  const AttentionArgs args{.cache = *cache,
                           .p = *problem,
                           .tables = *tables,
                           .splits = static_cast<int>(splits),
                           .group = static_cast<int>(problem->heads / cache->heads),
                           .block_bytes = cache->heads * cache->block_tokens * row};
  const bool quantized = cache->storage == LLMQAT_KV_INT8 || cache->storage == LLMQAT_KV_INT4;
  const bool aligned = aligned_16(cache->k) && aligned_16(cache->v) &&
                       (!cache->pre_rope || (aligned_16(tables->cos) && aligned_16(tables->sin)));
  const bool tensor = attention_uses_tensor_cores(problem->dtype != LLMQAT_FLOAT32, quantized,
                                                  cache->head_dim, aligned);
  const int error =
      tensor ? launch_attention_mma(args, stream) : launch_attention_scalar(args, stream);
  if (error != cudaSuccess) return error;
  return launch_attention_combine(args, stream);
}
