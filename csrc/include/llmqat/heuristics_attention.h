// How the CUDA attention operators cut their work: pure host functions.
//
// What fixes the bits of a query depends on the model alone: the split, and the warps that share
// its tokens (attention_parts). How warps are put into blocks (attention_plan) depends on the
// batch, the context and the device, and changes no bit.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llmqat {

// Tokens of one cached head that are added up before the splits are. Half as many would double the
// partial sums (6 % of an int4 cache of 128-wide heads).
inline constexpr int kAttentionSplit = 256;

inline constexpr int kAttentionTileTokens = 16;  // tokens that a warp takes at a time
inline constexpr int kAttentionWarps = 8;
inline constexpr int kAttentionHeadRows = 8;     // query heads of one warp: the n of an MMA
inline constexpr int kAttentionBlocksPerSm = 2;  // that registers and shared memory allow

// Tokens of one page of a paged cache. A tile of a warp never crosses a page.
inline constexpr int kPageTokens = 64;

inline int64_t attention_splits(int64_t max_length) {
  return (max_length + kAttentionSplit - 1) / kAttentionSplit;
}

// Warps that share the tokens of a cached head in a split: tile t belongs to warp t % parts. Their
// sums are added in the order of the warps. Few heads need more warps on the tokens.
inline int64_t attention_parts(int64_t kv_heads) {
  return kv_heads >= 16 ? 2 : kv_heads >= 4 ? 4 : 8;
}

struct AttentionShape {
  int64_t queries, heads, kv_heads, head_dim, max_length;
  bool rotates;  // K is rotated by tables that a block stages for its heads
};

// heads cached heads a block, with all of their parts (pieces = 1: a block adds up a split) or with
// one (pieces = parts: each is a partial sum of its own, and the last kernel adds them up).
struct AttentionPlan {
  int64_t heads, pieces;
};

inline int64_t attention_blocks(const AttentionShape& s, AttentionPlan plan) {
  const int64_t group = s.heads / s.kv_heads;
  const int64_t chunks = (group + kAttentionHeadRows - 1) / kAttentionHeadRows;
  return s.queries * attention_splits(s.max_length) * plan.pieces * chunks *
         ((s.kv_heads + plan.heads - 1) / plan.heads);
}

// Bytes that a plan moves for a split of one query beyond codes and scales: the tables that its
// blocks read from L2; partial sums, written and read, twice over, since they may go to memory.
inline int64_t attention_extra_bytes(const AttentionShape& s, AttentionPlan plan) {
  const AttentionShape one = {1, s.heads, s.kv_heads, s.head_dim, kAttentionSplit, s.rotates};
  const int64_t tokens = kAttentionSplit / plan.pieces;
  const int64_t tables = s.rotates ? attention_blocks(one, plan) * tokens * s.head_dim * 4 : 0;
  return tables + 2 * 2 * s.heads * plan.pieces * (s.head_dim + 2) * 4;
}

// One block for all parts of a head.
inline AttentionPlan attention_whole(const AttentionShape& s) {
  return {kAttentionWarps / attention_parts(s.kv_heads), 1};
}

// One block for one part of as many heads as leave most of the device busy: the more heads, the
// fewer blocks stage the same tables. Warps without a head help to stage.
inline AttentionPlan attention_apart(const AttentionShape& s, int64_t sms) {
  AttentionPlan plan = {kAttentionWarps, attention_parts(s.kv_heads)};
  while (plan.heads > 1 &&
         (plan.heads / 2 >= s.kv_heads || 4 * attention_blocks(s, plan) < 3 * sms)) {
    plan.heads /= 2;
  }
  return plan;
}

inline AttentionPlan attention_plan(const AttentionShape& s, int64_t sms) {
  const AttentionPlan whole = attention_whole(s), apart = attention_apart(s, sms);
  if (attention_blocks(s, whole) < kAttentionBlocksPerSm * sms) return apart;
  return attention_extra_bytes(s, apart) < attention_extra_bytes(s, whole) ? apart : whole;
}

// Whether the tensor core kernel takes the problem; the other one takes every even head dimension,
// fp32 queries and float caches. `aligned`: q, codes and tables begin at multiples of 16 bytes.
inline bool attention_uses_tensor_cores(bool half_queries, bool quantized, int64_t head_dim,
                                        bool aligned) {
  return half_queries && quantized && (head_dim == 64 || head_dim == 128) && aligned;
}

// Bytes of partial sums: head_dim values, the maximum and the sum of each query head and piece.
inline int64_t attention_workspace_bytes(const AttentionShape& s, int64_t pieces) {
  return s.queries * s.heads * attention_splits(s.max_length) * pieces * (s.head_dim + 2) * 4;
}

// The kernel that adds the splits: threads for 128 columns, as many times as there are groups of
// splits to add at once (8 x 128 threads at most).
inline constexpr int kCombineColumns = 128, kCombineLanes = 8;
inline constexpr int kCombineGroup = 8;  // splits that are added in order before the groups are

inline int64_t attention_combine_lanes(int64_t max_length) {
  const int64_t groups = (attention_splits(max_length) + kCombineGroup - 1) / kCombineGroup;
  return std::clamp<int64_t>(groups, 1, kCombineLanes);
}

// Threads of a block that writes one token's keys or values to the cache in `paper` mode.
inline int64_t append_threads(int64_t values, int64_t vector) {
  const int64_t loads = (values + vector - 1) / std::max<int64_t>(1, vector);
  return std::clamp<int64_t>((loads + 31) / 32, 1, 8) * 32;
}

}  // namespace llmqat
