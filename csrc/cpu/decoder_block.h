// Decoder blocks whose linears all take codes, one after the other, on the CPU.
//
// Math:    for each block (spec 2-4, 7, 9, 12, 14), s the residual stream:
//            qkv = linear(quantize(rms_norm(s)));  cache <- k, v;  a = attention(rope(q))
//            s = s + linear(quantize(a));  gate, up = linear(quantize(rms_norm(s)))
//            s = s + linear(quantize(silu(gate) * up))
//          The sums happen where the next norm reads them, as in rms_norm_quantize.
// Shapes:  hidden [n, H]; qkv [n, (heads + 2 kv_heads) D]; gate_up [n, 2 I], gate first.
// Cost:    that of the row, matrix and attention kernels it calls; nothing is allocated once the
//          thread's scratch has grown, but for some words a matmul.
// Numerics: the bits of the same kernels called one by one.
// Edges:   no rows or no blocks: nothing happens.
// Limits:  sizes, slots, positions and tables were checked by the binding.
// Tests:   tests/kernels/test_decoder_block_native.py
#pragma once

#include <cstdint>

#include "kv_cache.h"
#include "parallel.h"
#include "quantized_matmul.h"

namespace llmqat::cpu {

// A repacked integer weight [n, k]; with multipliers [n, k / group_size] its scale is [n] (spec
// 18).
struct IntLinear {
  const void* panels;
  Layout layout;
  int64_t n, k;
  const float* scale;
  int64_t group_size;         // -1: one scale a channel
  const float* bias;          // or nullptr
  const uint8_t* multiplier;  // or nullptr
};

struct DecoderBlock {
  const float* input_norm;
  const float* post_norm;
  float input_eps, post_eps;
  int bits;  // of the activations
  IntLinear qkv, o, gate_up, down;
  KvCache cache;
};

struct DecoderRows {
  int64_t n;
  int64_t hidden;  // columns
  int64_t heads;
  const int64_t* slots;
  const int64_t* positions;
  RopeTables tables;
  float scaling;
};

// stream [n, hidden]: the residual stream, in and out. T is float, llmqat::bf16 or llmqat::fp16.
template <class T>
void run_decoder_blocks(const Parallel& parallel, const DecoderBlock* blocks, int64_t count,
                        const DecoderRows& rows, T* stream);

}  // namespace llmqat::cpu
