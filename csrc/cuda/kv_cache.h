// The C interface of the operators on the KV cache (spec 9): no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/launchers.h"

extern "C" {

enum LlmqatStorage {
  LLMQAT_KV_INT8 = 0,
  LLMQAT_KV_INT4 = 1,  // two codes a byte
  LLMQAT_KV_FLOAT32 = 2,
  LLMQAT_KV_BFLOAT16 = 3,
  LLMQAT_KV_FLOAT16 = 4
};

// Codes [blocks, heads, block_tokens, D or D / 2], scales [blocks, block_tokens] (pre_rope) or
// [blocks, heads, block_tokens]. Contiguous: a block is a slot. Paged: a block is a page of 64
// tokens, and page_table [slots, pages] says which page holds tokens 64 * j .. 64 * j + 63 of a
// slot; entries of tokens that a slot does not have are never read.
struct LlmqatKvCache {
  void *k, *v;
  float *k_scale, *v_scale;   // not read for float storage
  const int32_t* page_table;  // null: contiguous
  int64_t slots, pages;       // rows and columns of the table; pages = 0 without one
  int64_t blocks, heads, block_tokens, head_dim;
  int storage, bits;
  bool pre_rope;  // K is stored before RoPE, one scale a token (`paper`); never with float storage
};

struct LlmqatRopeTables {
  const float *cos, *sin;  // [rows, D / 2]
  int64_t rows;
};

// Activations [n, heads, D]: the values of a head lie side by side, heads and tokens anywhere, at
// any address. So k, v and q may be views of one product.
struct LlmqatHeads {
  const void* data;
  int64_t token, head;  // strides, in values
};

struct LlmqatAppend {
  LlmqatHeads k, v;                  // [n, heads of the cache, D] of dtype
  LlmqatHeads q;                     // [n, q_heads, D] of dtype; not read without q_out
  void* q_out;                       // [n, q_heads, D] of dtype: q rotated; null: not wanted
  const int64_t *slots, *positions;  // [n]; a place outside the cache is not written
  int64_t n;
  int64_t q_heads;  // a multiple of the cache's heads
  int dtype;
};

int llmqat_cuda_rope_quantize_append(const LlmqatKvCache* cache, const LlmqatAppend* problem,
                                     const LlmqatRopeTables* tables, void* stream);

// How blocks are made of warps; no bit of a result depends on it (heuristics_attention.h).
enum LlmqatAttentionPlan {
  LLMQAT_ATTENTION_AUTO = 0,
  LLMQAT_ATTENTION_WHOLE = 1,  // a block adds up a split
  LLMQAT_ATTENTION_APART = 2   // a block has one part of it
};

struct LlmqatAttention {
  LlmqatHeads q;                   // [n, heads, D] of dtype
  const int64_t *slots, *lengths;  // [n]; a slot or length outside the cache gives NaN
  void* out;                       // [n, heads, D] of dtype
  int8_t* codes;       // [n, heads * D]: quantize(out) at quantize_bits; null: not wanted
  float* codes_scale;  // [n]
  float* workspace;    // llmqat_cuda_attention_workspace bytes
  uint32_t* tickets;   // [n], when codes are wanted; anything before, after and between launches
  int64_t n, heads;
  int64_t max_length;  // sizes the grid; a longer query gives NaN
  int64_t sms;         // multiprocessors of the device
  float scaling;
  int dtype, quantize_bits;
  int plan;  // LlmqatAttentionPlan
};

// Bytes of partial sums; the pointers of results need not be set yet.
int64_t llmqat_cuda_attention_workspace(const LlmqatKvCache* cache, const LlmqatAttention* problem,
                                        const LlmqatRopeTables* tables);

int llmqat_cuda_attention_decode(const LlmqatKvCache* cache, const LlmqatAttention* problem,
                                 const LlmqatRopeTables* tables, void* stream);

}  // extern "C"
