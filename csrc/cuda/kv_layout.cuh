// Where a token lies in a contiguous or paged KV cache (kv_cache.h).
#pragma once

#include "cuda/kv_cache.h"
#include "llmqat/arch.cuh"
#include "llmqat/heuristics_attention.h"

namespace llmqat {

struct TokenPlace {
  int64_t block;   // -1: the page table names no page
  int64_t offset;  // in the block
};

// `slot` and `token` are inside the cache.
LLMQAT_DEVICE TokenPlace token_place(const LlmqatKvCache& cache, int64_t slot, int64_t token) {
  if (cache.page_table == nullptr) return {slot, token};
  const int64_t page = cache.page_table[slot * cache.pages + token / kPageTokens];
  return {page >= 0 && page < cache.blocks ? page : -1, token % kPageTokens};
}

// Row of [blocks, heads, block_tokens].
LLMQAT_DEVICE int64_t head_row(const LlmqatKvCache& cache, TokenPlace at, int64_t head) {
  return (at.block * cache.heads + head) * cache.block_tokens + at.offset;
}

// Where the token's scale is in k_scale and v_scale.
LLMQAT_DEVICE int64_t scale_index(const LlmqatKvCache& cache, TokenPlace at, int64_t head) {
  return cache.pre_rope ? at.block * cache.block_tokens + at.offset : head_row(cache, at, head);
}

// Tokens that a slot can hold.
LLMQAT_DEVICE int64_t slot_capacity(const LlmqatKvCache& cache) {
  return cache.page_table == nullptr ? cache.block_tokens : cache.pages * kPageTokens;
}

}  // namespace llmqat
