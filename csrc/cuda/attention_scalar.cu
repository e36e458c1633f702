// attention_decode in fp32 on CUDA cores: fp32 queries, float caches, any even head dimension.
//
// Math:     spec 9: s_t = scaling k_scale_t (q . k_t); sums = sum_t e^(s_t - top) v_scale_t v_t and
//           total = sum_t e^(s_t - top) over the tokens of a split.
// Shapes:   q [n, H, D]; cache and tables: kv_cache.h; partial sums: attention_args.cuh.
// Dtypes:   q fp32, fp16, bf16; cache int8, packed int4, fp32, fp16, bf16; arithmetic fp32.
// Tiling:   a block is 256 tokens of one query head. Scores: a warp takes a token, its lanes the
//           pairs (i, i + D / 2) of the head. Values: a thread takes a column. Simple on purpose:
//           the fast form is attention_mma.cu; here a GQA group reads its cached head once a head.
// Cost:     one read of codes and scales a query head.
// Numerics: 2x rule: K is rotated in fp32 with the fp32 tables; exp of spec 13.
// Edges:    tokens past the length are never read. Table rows that do not exist give NaN.
// Limits:   head_dim even and at most 1024.
// Tests:    tests/emulator/test_attention_decode.py
// Bench:    python -m benchmarks.run --op attention_decode --device cuda
#include <climits>

#include "cuda/attention_args.cuh"
#include "llmqat/fast_math.h"
#include "llmqat/int4.h"

namespace llmqat {
namespace {

constexpr int kScalarThreads = 128;
constexpr int kScalarWarps = kScalarThreads / 32;

template <int kStorage>
LLMQAT_DEVICE float cached_value(const void* x, int64_t row, int dim, int column) {
  const int64_t at = row * dim + column;
  if constexpr (kStorage == LLMQAT_KV_INT8) {
    return static_cast<float>(static_cast<const int8_t*>(x)[at]);
  } else if constexpr (kStorage == LLMQAT_KV_INT4) {  // dim is even
    const uint8_t byte = static_cast<const uint8_t*>(x)[at / 2];
    return static_cast<float>(column % 2 == 0 ? unpack_even(byte) : unpack_odd(byte));
  } else if constexpr (kStorage == LLMQAT_KV_FLOAT32) {
    return static_cast<const float*>(x)[at];
  } else if constexpr (kStorage == LLMQAT_KV_BFLOAT16) {
    return to_float(static_cast<const bf16*>(x)[at]);
  } else {
    return to_float(static_cast<const fp16*>(x)[at]);
  }
}

// Over the block's threads, in every thread.
template <class F>
LLMQAT_DEVICE float reduce(float v, float* shared, F combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = combine(v, shuffle_xor(v, mask));
  sync_block();  // what the last reduction left has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  sync_block();
  v = shared[0];
  for (int i = 1; i < kScalarWarps; ++i) v = combine(v, shared[i]);
  return v;
}

template <int kStorage>
LLMQAT_KERNEL(kScalarThreads)
attention_scalar_kernel(AttentionArgs args) {
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  const int query = static_cast<int>(blockIdx.x) / args.splits;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  clear_ticket(args, query, split);
  const QueryRange range = query_range(args, query);
  const int start = split * kAttentionSplit;
  if (start >= range.length) return;  // the whole block
  const int left = range.length - start, count = left < kAttentionSplit ? left : kAttentionSplit;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / args.group;
  const int dim = static_cast<int>(args.cache.head_dim), half = dim / 2;
  constexpr bool kQuantized = kStorage == LLMQAT_KV_INT8 || kStorage == LLMQAT_KV_INT4;
  const bool rotate = kQuantized && args.cache.pre_rope;
  const float nan = bits_float(0x7FC00000u);

  int64_t* const rows = reinterpret_cast<int64_t*>(shared);                 // [split]
  float* const reduced = reinterpret_cast<float*>(rows + kAttentionSplit);  // [warps]
  float* const weights = reduced + kScalarWarps;                            // [split]
  float* const queries = weights + kAttentionSplit;                         // [dim]
  const int64_t first = query_offset(args, query, head);
  for (int c = static_cast<int>(threadIdx.x); c < dim; c += kScalarThreads) {
    queries[c] = load_float(args.p.q.data, args.p.dtype, first + c);
  }
  sync_block();

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int t = warp; t < count; t += kScalarWarps) {
    const int64_t token = int64_t{start} + t;
    const TokenPlace at = token_place(args.cache, range.slot, token);
    const bool there = at.block >= 0 && (!rotate || token < args.tables.rows);
    const int64_t row = there ? head_row(args.cache, at, kv_head) : 0;
    float sum = there ? 0.0f : nan;
    for (int i = lane; i < (there ? half : 0); i += 32) {
      float x1 = cached_value<kStorage>(args.cache.k, row, dim, i);
      float x2 = cached_value<kStorage>(args.cache.k, row, dim, i + half);
      if (rotate) {
        const float cosine = args.tables.cos[token * half + i];
        const float sine = args.tables.sin[token * half + i];
        const float y1 = x1 * cosine - x2 * sine;
        x2 = x2 * cosine + x1 * sine;
        x1 = y1;
      }
      sum += queries[i] * x1;
      sum += queries[i + half] * x2;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) {
      rows[t] = row;  // of a page that does not exist: any, its weight is NaN
      if (kQuantized && at.block >= 0) {
        sum *= args.cache.k_scale[scale_index(args.cache, at, kv_head)];
      }
      weights[t] = sum * args.p.scaling;
    }
  }
  sync_block();

  float top = bits_float(kInfBits | 0x80000000u);
  for (int t = static_cast<int>(threadIdx.x); t < count; t += kScalarThreads) {
    top = fmaxf(top, weights[t]);
  }
  top = reduce(top, reduced, [](float a, float b) { return fmaxf(a, b); });
  float total = 0.0f;
  for (int t = static_cast<int>(threadIdx.x); t < count; t += kScalarThreads) {
    const TokenPlace at = token_place(args.cache, range.slot, int64_t{start} + t);
    float weight = exp_f32(weights[t] - top);
    total += weight;
    if (kQuantized && at.block >= 0) {
      weight *= args.cache.v_scale[scale_index(args.cache, at, kv_head)];
    }
    weights[t] = weight;
  }
  total = reduce(total, reduced, [](float a, float b) { return a + b; });  // and a barrier

  const Partial to = partial_of(args, query, head, split);
  for (int c = static_cast<int>(threadIdx.x); c < dim; c += kScalarThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      sum += weights[t] * cached_value<kStorage>(args.cache.v, rows[t], dim, c);
    }
    to.sums[c] = sum;
  }
  if (threadIdx.x == 0) {
    *to.top = top;
    *to.total = total;
  }
}

template <int kStorage>
void launch_scalar(const AttentionArgs& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(args.p.n * args.splits),
                  static_cast<unsigned>(args.p.heads));
  const size_t bytes =
      kAttentionSplit * sizeof(int64_t) +
      static_cast<size_t>(kScalarWarps + kAttentionSplit + args.cache.head_dim) * sizeof(float);
  LLMQAT_LAUNCH_SHARED((attention_scalar_kernel<kStorage>), grid, dim3(kScalarThreads), bytes,
                       stream, args);
}

}  // namespace

int launch_attention_scalar(const AttentionArgs& args, void* stream) {
  using Launch = void (*)(const AttentionArgs&, void*);
  constexpr Launch kTable[] = {launch_scalar<LLMQAT_KV_INT8>, launch_scalar<LLMQAT_KV_INT4>,
                               launch_scalar<LLMQAT_KV_FLOAT32>, launch_scalar<LLMQAT_KV_BFLOAT16>,
                               launch_scalar<LLMQAT_KV_FLOAT16>};
  kTable[args.cache.storage](args, stream);
  return cudaGetLastError();
}

}  // namespace llmqat
