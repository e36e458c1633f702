// How the CUDA attention operators cut their work: pure host functions. Nothing here depends on the
// batch, the lengths or the size of the cache, so a query's bits do not either.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llmqat {

// Tokens of one cached head that one partial sum covers. 2048 tokens of 32 heads are 64 blocks of
// 8 warps; half as many would double the partial sums (6 % of an int4 cache of 128-wide heads).
inline constexpr int kAttentionSplit = 256;

inline constexpr int kAttentionWarps = 8;
inline constexpr int kAttentionHeadRows = 8;  // query heads of one warp: the n of an MMA

// Tokens of one page of a paged cache. A tile of a warp (at most 32 tokens) never crosses a page.
inline constexpr int kPageTokens = 64;

inline int64_t attention_splits(int64_t max_length) {
  return (max_length + kAttentionSplit - 1) / kAttentionSplit;
}

// KV heads of one block; its other warps share their tokens. Several heads share one staged RoPE
// table; few heads need their warps on the tokens instead.
inline int64_t attention_block_heads(int64_t kv_heads) {
  return kv_heads >= 16 ? 4 : kv_heads >= 4 ? 2 : 1;
}

// Whether the tensor core kernel takes the problem; the other one takes every even head dimension,
// fp32 queries and float caches. `aligned`: q, codes and tables begin at multiples of 16 bytes.
inline bool attention_uses_tensor_cores(bool half_queries, bool quantized, int64_t head_dim,
                                        bool aligned) {
  return half_queries && quantized && (head_dim == 64 || head_dim == 128) && aligned;
}

// Bytes of partial sums: head_dim values, the maximum and the sum of each query head and split.
inline int64_t attention_workspace_bytes(int64_t queries, int64_t heads, int64_t head_dim,
                                         int64_t max_length) {
  return queries * heads * attention_splits(max_length) * (head_dim + 2) * 4;
}

// Threads of a block that writes one token's keys or values to the cache in `paper` mode.
inline int64_t append_threads(int64_t values, int64_t vector) {
  const int64_t loads = (values + vector - 1) / std::max<int64_t>(1, vector);
  return std::clamp<int64_t>((loads + 31) / 32, 1, 8) * 32;
}

}  // namespace llmqat
