// Attention of a few queries of one slot over one KV head of the cache, on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat::cpu {

inline constexpr int64_t kAttentionRows = 32;   // (query, head) pairs of one call at most
inline constexpr int64_t kAttentionBlock = 64;  // tokens whose scores exist at one time

// One slot and one KV head. Token t lies `row` elements after token t-1 (bytes for packed codes).
template <class C>
struct CachedHead {
  const C* k;
  const C* v;
  const float* k_scale;  // of token 0; nullptr for a float cache
  const float* v_scale;
  const float* cos;  // [T, head_dim / 2] where K is to be rotated on reading, else nullptr
  const float* sin;
  int64_t head_dim;
  int64_t row;
};

inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Floats of scratch for attend(), which aligns it to cache lines itself: hence the 16 more.
inline int64_t attention_scratch(int64_t head_dim) {
  return padded_head_dim(head_dim) * (2 * kAttentionBlock + 2 * kAttentionRows) +
         kAttentionBlock * kAttentionRows + 16;
}

// Row r: query q + offsets[r] (head_dim values) over tokens 0..lengths[r]-1, to out + offsets[r]
// (spec 9). rows <= kAttentionRows. C is int8_t, uint8_t (packed int4), float, bf16 or fp16.
template <class T, class C>
void attend(const CachedHead<C>& cache, const T* q, const int64_t* offsets, const int64_t* lengths,
            int64_t rows, float scaling, T* out, float* scratch);

}  // namespace llmqat::cpu
