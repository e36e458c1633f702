// attention_decode: picks the kernel, adds the partial sums of the splits, quantizes the rows.
//
// Math:     spec 9: out[d] = sum_s f_s sums_s[d] / sum_s f_s total_s, f_s = e^(top_s - top). Codes:
//           spec 1-4 of the row of all heads, as rounded to the dtype of the model.
// Shapes:   partial sums: attention_args.cuh; out [n, H, D], codes [n, H * D], scale [n].
// Dtypes:   partial sums fp32; out fp32, fp16, bf16; codes int8.
// Tiling:   a block adds one query head, a thread a column of every lanes-th group of 8 splits: 8
//           loads are on their way at a time, and 512 splits (128k tokens) are 8 rounds of 8 x 128
//           threads instead of a chain of 512 loads. With codes: the last block of a query to
//           arrive (a ticket, cleared by the splits) reads the row again, from L2, and quantizes
//           it. One block a query would be simpler, but a long context at batch 1 would then read
//           all of its partial sums through one multiprocessor: 1 MB at 16k tokens of 32 heads,
//           11 us.
// Cost:     one read of the partial sums, from L2; latency-bound.
// Numerics: pieces in order to a split, 8 splits in order to a group, groups in order: by the
//           tokens' places alone. exp of spec 13. Codes are bit-equal to quantize(out).
// Edges:    length 0 gives 0, codes 0 and scale 1; a slot or length outside the cache gives NaN.
// Limits:   n * pieces < 2^31, H <= 65535, D even.
// Tests:    tests/emulator/test_attention_decode.py
// Bench:    python -m benchmarks.run --op attention_decode --device cuda
#include <algorithm>
#include <climits>

#include "cuda/attention_args.cuh"
#include "llmqat/fast_math.h"
#include "llmqat/reduce.cuh"

namespace llmqat {
namespace {

constexpr int kMaxCombineThreads = kCombineColumns * kCombineLanes;
constexpr int kCombineChunk = 256;  // splits whose factors are in shared memory at most

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
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    const uint32_t m = magnitude_bits(load_float(args.p.out, args.p.dtype, first + c));
    largest = m > largest ? m : largest;
  }
  const RowScale row = row_scale(row_max_u32(largest), args.p.quantize_bits, false);
  const float limit = static_cast<float>(qmax(args.p.quantize_bits));
  if (threadIdx.x == 0) args.p.codes_scale[query] = row.scale;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    const float v = load_float(args.p.out, args.p.dtype, first + c);
    args.p.codes[first + c] = row.zero ? int8_t{0} : quantize_code(v, row.inv, limit);
  }
}

// Shared memory of a block for `chunk` splits, a multiple of kCombineGroup.
struct Combine {
  float *factors, *totals;    // [split]: e^(top of the split - top), and that times its total
  float* shares;              // [split, piece]: what a piece is multiplied by
  float *sums, *group_total;  // [group of splits, column], [group]
  float* tops;                // [warp]
  uint32_t* arrived;

  LLMQAT_DEVICE Combine(unsigned char* shared, int chunk, int pieces)
      : factors(reinterpret_cast<float*>(shared)),
        totals(factors + chunk),
        shares(totals + chunk),
        sums(shares + chunk * pieces),
        group_total(sums + chunk / kCombineGroup * kCombineColumns),
        tops(group_total + chunk / kCombineGroup),
        arrived(reinterpret_cast<uint32_t*>(tops + kMaxCombineThreads / 32)) {}
};

size_t combine_bytes(int chunk, int pieces) {
  const int values = chunk * (2 + pieces) + chunk / kCombineGroup * (kCombineColumns + 1) +
                     kMaxCombineThreads / 32 + 1;
  return static_cast<size_t>(values) * sizeof(float);
}

// Whether a piece of a split has tokens: its first tile is there.
LLMQAT_DEVICE bool has_piece(int length, int split, int piece) {
  return split * kAttentionSplit + piece * kAttentionTileTokens < length;
}

// The largest score of a split's pieces, as they have it.
LLMQAT_DEVICE float split_top(const AttentionArgs& args, int query, int head, int length,
                              int split) {
  const Partial first = partial_of(args, query, head, int64_t{split} * args.pieces);
  float top = first.top[0];
  for (int p = 1; p < args.pieces && has_piece(length, split, p); ++p) {
    top = fmaxf(top, first.top[p]);
  }
  return top;
}

// As the kernels write it that add a split up.
LLMQAT_DEVICE float natural(const AttentionArgs& args, float top) {
  return args.pieces == 1 ? top : mul_rn(top, kLn2);
}

// The largest score of all splits, in every thread.
LLMQAT_DEVICE float largest_top(const AttentionArgs& args, int query, int head, int length,
                                int splits, float* tops) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float top = bits_float(kInfBits | 0x80000000u);
  for (int s = thread; s < splits; s += threads) {
    top = fmaxf(top, split_top(args, query, head, length, s));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
  if (thread % 32 == 0) tops[thread / 32] = top;
  sync_block();
  for (int i = 0; i < threads / 32; ++i) top = fmaxf(top, tops[i]);
  return natural(args, top);
}

// Factors of the chunk of splits that begins at `from`; 0 for those and for pieces that are not
// there.
LLMQAT_DEVICE void stage_factors(const AttentionArgs& args, int query, int head, int length,
                                 int from, int chunk, float top, const Combine& to) {
  for (int i = static_cast<int>(threadIdx.x); i < chunk; i += static_cast<int>(blockDim.x)) {
    const int split = from + i;
    const bool there = has_piece(length, split, 0);
    const float own = there ? split_top(args, query, head, length, split) : 0.0f;
    float total = 0.0f;
    for (int p = 0; p < args.pieces; ++p) {
      float share = 0.0f;
      if (has_piece(length, split, p)) {
        const Partial part = partial_of(args, query, head, int64_t{split} * args.pieces + p);
        share = args.pieces == 1 ? 1.0f : part_share(*part.top, own);
        total = add_part(total, *part.total, share);
      }
      to.shares[i * args.pieces + p] = share;
    }
    const float factor = there ? exp_f32(natural(args, own) - top) : 0.0f;
    to.factors[i] = factor;
    to.totals[i] = factor * total;
  }
}

// One column of group `group` of the chunk: pieces in order to splits, splits in order to a sum.
LLMQAT_DEVICE float add_group(const AttentionArgs& args, const float* column, int length, int from,
                              int group, const Combine& factors) {
  const int first = group * kCombineGroup;
  const int64_t dim = args.cache.head_dim, step = args.pieces * dim;
  column += first * step;
  float splits[kCombineGroup] = {};
#pragma unroll 2
  for (int p = 0; p < args.pieces; ++p, column += dim) {
    float part[kCombineGroup];  // all on their way before the first is added
#pragma unroll
    for (int i = 0; i < kCombineGroup; ++i) {
      part[i] = has_piece(length, from + first + i, p) ? column[i * step] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kCombineGroup; ++i) {
      splits[i] = add_part(splits[i], part[i], factors.shares[(first + i) * args.pieces + p]);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCombineGroup; ++i) sum += factors.factors[first + i] * splits[i];
  return sum;
}

// sum and total of one column over all splits; what the threads of the first lane return counts.
struct Column {
  float sum, total;
};

LLMQAT_DEVICE Column add_splits(const AttentionArgs& args, int query, int head, int length,
                                int splits, int chunk, int64_t column, float top,
                                const Combine& shared) {
  const int place = static_cast<int>(threadIdx.x) % kCombineColumns;
  const int lane = static_cast<int>(threadIdx.x) / kCombineColumns;
  const int lanes = static_cast<int>(blockDim.x) / kCombineColumns;
  Column all{0.0f, 0.0f};
  for (int from = 0; from < splits; from += chunk) {
    const int left = splits - from;
    const int groups = ((left < chunk ? left : chunk) + kCombineGroup - 1) / kCombineGroup;
    stage_factors(args, query, head, length, from, chunk, top, shared);
    sync_block();
    const float* const sums = partial_of(args, query, head, int64_t{from} * args.pieces).sums;
    for (int g = lane; g < groups; g += lanes) {
      if (column < args.cache.head_dim) {
        shared.sums[g * kCombineColumns + place] =
            add_group(args, sums + column, length, from, g, shared);
      }
      if (place != 0) continue;
      float total = 0.0f;
      for (int i = 0; i < kCombineGroup; ++i) total += shared.totals[g * kCombineGroup + i];
      shared.group_total[g] = total;
    }
    sync_block();
    for (int g = 0; lane == 0 && g < groups; ++g) {
      all.sum += shared.sums[g * kCombineColumns + place];
      all.total += shared.group_total[g];
    }
    sync_block();  // before the factors are overwritten
  }
  return all;
}

LLMQAT_KERNEL(kMaxCombineThreads)
combine_kernel(AttentionArgs args, int chunk) {
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  const Combine work(shared, chunk, args.pieces);
  const int query = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const QueryRange range = query_range(args, query);
  const int splits = (range.length + kAttentionSplit - 1) / kAttentionSplit;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t dim = args.cache.head_dim;

  const float top = largest_top(args, query, head, range.length, splits, work.tops);
  for (int64_t base = 0; base < dim; base += kCombineColumns) {
    const int64_t column = base + thread % kCombineColumns;
    const Column all =
        add_splits(args, query, head, range.length, splits, chunk, column, top, work);
    const float empty = range.inside ? 0.0f : bits_float(0x7FC00000u);
    if (thread < kCombineColumns && column < dim) {
      store_float(args.p.out, args.p.dtype, (query * args.p.heads + head) * dim + column,
                  splits > 0 ? div_rn(all.sum, all.total) : empty);
    }
  }
  if (args.p.codes == nullptr) return;

  thread_fence();
  sync_block();  // every value of this head is out
  if (thread == 0) *work.arrived = atomic_add_u32(args.p.tickets + query, 1u);
  sync_block();
  if (*work.arrived + 1 != static_cast<uint32_t>(args.p.heads)) return;
  thread_fence();
  quantize_output(args, query);
}

}  // namespace

int launch_attention_combine(const AttentionArgs& args, void* stream) {
  const int lanes = static_cast<int>(attention_combine_lanes(args.p.max_length));
  const int groups = (args.splits + kCombineGroup - 1) / kCombineGroup;
  const int chunk = groups * kCombineGroup < kCombineChunk ? groups * kCombineGroup : kCombineChunk;
  const dim3 grid(static_cast<unsigned>(args.p.n), static_cast<unsigned>(args.p.heads));
  LLMQAT_LAUNCH_SHARED(combine_kernel, grid, dim3(kCombineColumns * lanes),
                       combine_bytes(chunk, args.pieces), stream, args, chunk);
  return cudaGetLastError();
}

namespace {

bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool uses_tensor_cores(const LlmqatKvCache& cache, const LlmqatAttention& p,
                       const LlmqatRopeTables& tables) {
  const bool quantized = cache.storage == LLMQAT_KV_INT8 || cache.storage == LLMQAT_KV_INT4;
  const bool aligned = aligned_16(cache.k) && aligned_16(cache.v) && aligned_16(p.q.data) &&
                       p.q.token % 8 == 0 && p.q.head % 8 == 0 &&
                       (!cache.pre_rope || (aligned_16(tables.cos) && aligned_16(tables.sin)));
  // Without a row of the tables there is nothing to read in the place of rows that do not exist.
  return attention_uses_tensor_cores(p.dtype != LLMQAT_FLOAT32, quantized, cache.head_dim,
                                     aligned && (!cache.pre_rope || tables.rows > 0));
}

AttentionShape shape_of(const LlmqatKvCache& cache, const LlmqatAttention& p) {
  return {p.n, p.heads, cache.heads, cache.head_dim, p.max_length, cache.pre_rope};
}

AttentionPlan plan_of(const LlmqatKvCache& cache, const LlmqatAttention& p,
                      const LlmqatRopeTables& tables) {
  const AttentionShape shape = shape_of(cache, p);
  if (!uses_tensor_cores(cache, p, tables)) return {1, 1};
  if (p.plan == LLMQAT_ATTENTION_WHOLE) return attention_whole(shape);
  if (p.plan == LLMQAT_ATTENTION_APART) return attention_apart(shape, p.sms);
  return attention_plan(shape, p.sms);
}

bool fits(const LlmqatKvCache& cache, const LlmqatAttention& p, int64_t pieces) {
  constexpr int64_t kMaxGridY = 65535;
  return p.n * pieces < INT_MAX && p.heads <= kMaxGridY && cache.slots <= INT_MAX &&
         p.max_length < INT_MAX - kCombineChunk * kAttentionSplit && cache.head_dim <= 1024;
}

}  // namespace
}  // namespace llmqat

extern "C" int64_t llmqat_cuda_attention_workspace(const LlmqatKvCache* cache,
                                                   const LlmqatAttention* problem,
                                                   const LlmqatRopeTables* tables) {
  using namespace llmqat;
  if (problem->heads == 0 || cache->heads == 0) return 0;
  const AttentionPlan plan = plan_of(*cache, *problem, *tables);
  return attention_workspace_bytes(shape_of(*cache, *problem), plan.pieces);
}

extern "C" int llmqat_cuda_attention_decode(const LlmqatKvCache* cache,
                                            const LlmqatAttention* problem,
                                            const LlmqatRopeTables* tables, void* stream) {
  using namespace llmqat;
  if (problem->n == 0 || problem->heads == 0 || cache->head_dim == 0) return cudaSuccess;
  // At least one: the split kernels clear the tickets.
  const int64_t splits = std::max<int64_t>(1, attention_splits(problem->max_length));
  const AttentionPlan plan = plan_of(*cache, *problem, *tables);
  if (!fits(*cache, *problem, splits * plan.pieces)) return cudaErrorInvalidValue;
  const int64_t row = cache->storage == LLMQAT_KV_INT4 ? cache->head_dim / 2 : cache->head_dim;
  const AttentionArgs args{.cache = *cache,
                           .p = *problem,
                           .tables = *tables,
                           .splits = static_cast<int>(splits),
                           .pieces = static_cast<int>(plan.pieces),
                           .group = static_cast<int>(problem->heads / cache->heads),
                           .block_bytes = cache->heads * cache->block_tokens * row};
  const int error = uses_tensor_cores(*cache, *problem, *tables)
                        ? launch_attention_mma(args, static_cast<int>(plan.heads), stream)
                        : launch_attention_scalar(args, stream);
  if (error != cudaSuccess) return error;
  return launch_attention_combine(args, stream);
}
