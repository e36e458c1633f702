// What the kernels of attention_decode share: arguments, the range of a query, partial sums.
#pragma once

#include "cuda/kv_layout.cuh"
#include "llmqat/arch.cuh"
#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr float kLn2 = 0.69314718055994531f;

struct AttentionArgs {
  LlmqatKvCache cache;
  LlmqatAttention p;
  LlmqatRopeTables tables;
  // These fit 32 bits (the launcher sees to it) and spare the kernels registers and divisions;
  // they are widened before they are multiplied into an address.
  int splits;           // of max_length
  int pieces;           // partial sums of a split; 1: the kernel has added the split up
  int group;            // query heads of a KV head
  int64_t block_bytes;  // of the codes of all heads of a block
};

struct QueryRange {
  int slot, length;  // length 0 where the slot or the length is outside the cache
  bool inside;
};

LLMQAT_DEVICE QueryRange query_range(const AttentionArgs& args, int64_t query) {
  const int64_t slot = args.p.slots[query], length = args.p.lengths[query];
  const int64_t held = slot_capacity(args.cache);
  const int64_t limit = args.p.max_length < held ? args.p.max_length : held;
  const bool inside = slot >= 0 && slot < args.cache.slots && length >= 0 && length <= limit;
  return {inside ? static_cast<int>(slot) : 0, inside ? static_cast<int>(length) : 0, inside};
}

// Where a query head begins in q.
LLMQAT_DEVICE int64_t query_offset(const AttentionArgs& args, int64_t query, int64_t head) {
  return query * args.p.q.token + head * args.p.q.head;
}

// By every block of the split kernels: tickets are 0 when combine_kernel runs, whatever they held.
// Nothing outlives a launch, so that an aborted one, a graph or another stream leaves no trace.
LLMQAT_DEVICE void clear_ticket(const AttentionArgs& args, int query, int piece) {
  if (args.p.codes == nullptr) return;
  if (piece == 0 && blockIdx.y == 0 && threadIdx.x == 0) args.p.tickets[query] = 0;
}

// Partial sums of one query head over one split: sums[d] = sum_t e^(s_t - top) v_t[d] and
// total = sum_t e^(s_t - top). Both may have been multiplied by one power of two. Of a piece of a
// split (args.pieces > 1), top is log2(e) times as large and the exponential is 2^x.
struct Partial {
  float* sums;  // head_dim values
  float *top, *total;
};

// `piece`: of all pieces of all splits, in the order of splits.
LLMQAT_DEVICE Partial partial_of(const AttentionArgs& args, int64_t query, int64_t head,
                                 int64_t piece) {
  const int64_t pieces = int64_t{args.splits} * args.pieces;
  const int64_t at = (query * args.p.heads + head) * pieces + piece;
  const int64_t count = args.p.n * args.p.heads * pieces;
  float* const ends = args.p.workspace + count * args.cache.head_dim;
  return {args.p.workspace + at * args.cache.head_dim, ends + at, ends + count + at};
}

// The parts of a split are added up in two places: in shared memory by the block that has them all,
// or from memory by attention_combine. These two functions name the roundings, so that both places
// give the same bits.
LLMQAT_DEVICE float part_share(float top, float top_of_all) {
  return exp2_approx(add_rn(top, -top_of_all));
}
LLMQAT_DEVICE float add_part(float sum, float value, float share) {
  return add_rn(sum, mul_rn(value, share));
}

LLMQAT_DEVICE float load_float(const void* x, int dtype, int64_t i) {
  if (dtype == LLMQAT_FLOAT32) return static_cast<const float*>(x)[i];
  if (dtype == LLMQAT_BFLOAT16) return to_float(static_cast<const bf16*>(x)[i]);
  return to_float(static_cast<const fp16*>(x)[i]);
}

// The launchers of the three kernels; blocks beyond a query's length leave at once.
// `heads`: cached heads of a block.
int launch_attention_mma(const AttentionArgs& args, int heads, void* stream);
int launch_attention_scalar(const AttentionArgs& args, void* stream);
int launch_attention_combine(const AttentionArgs& args, void* stream);

}  // namespace llmqat
