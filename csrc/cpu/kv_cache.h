// The KV cache on the CPU: rotate, write and attend for the rows of one step (spec 9).
//
// A row is one token of one slot. Slots, positions and lengths were checked by the binding: slots
// in [0, slots), positions in [0, tokens), lengths in [0, tokens], and the tables have a row for
// every position that is rotated. T is float, llmqat::bf16 or llmqat::fp16.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"
#include "parallel.h"

namespace llmqat::cpu {

enum class CacheType { int8, int4, float32, bfloat16, float16 };

// [slots, heads, tokens, row]: `row` elements (bytes of packed codes) for one token of one head.
struct KvCache {
  int64_t slots, heads, tokens, head_dim, row;
  int bits;
  CacheType type;
  bool pre_rope;  // K is held before RoPE: one scale a token over all heads
  void* k;
  void* v;
  float* k_scale;  // [slots, tokens] or [slots, heads, tokens]; unused by floats
  float* v_scale;

  bool quantized() const { return type == CacheType::int8 || type == CacheType::int4; }
  bool rotates_on_write() const { return !(quantized() && pre_rope); }
  bool rotates_on_read() const { return !rotates_on_write(); }
};

// fp32 [.., head_dim / 2].
struct RopeTables {
  const float* cos;
  const float* sin;
};

// n rows of heads x head_dim values that begin `stride` values apart, to out without gaps.
template <class T>
void rope_rows(const Parallel& parallel, const T* x, int64_t stride, int64_t n, int64_t heads,
               int64_t head_dim, const RopeTables& tables, const int64_t* positions, T* out);

// Writes n rows of K (before RoPE) and V; rows begin `stride` values apart.
template <class T>
void append_rows(const Parallel& parallel, const KvCache& cache, const T* k, const T* v,
                 int64_t stride, int64_t n, const RopeTables& tables, const int64_t* slots,
                 const int64_t* positions);

// q, out [n, heads, head_dim]; row i sees the tokens 0 .. lengths[i] - 1 of its slot.
template <class T>
void attend_rows(const Parallel& parallel, const KvCache& cache, const T* q, int64_t n,
                 int64_t heads, const RopeTables& tables, const int64_t* slots,
                 const int64_t* lengths, float scaling, T* out);

}  // namespace llmqat::cpu
