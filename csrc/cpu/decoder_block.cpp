// See decoder_block.h.
#include "decoder_block.h"

#include <algorithm>
#include <cstddef>

#include "activation.h"
#include "matmul_cuts.h"
#include "norm.h"
#include "rows.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

thread_local Scratch<std::byte> t_arena;

// Hands out cache-aligned pieces of one run of memory; with nullptr, only counts them.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    std::byte* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

// What lives between the kernels of a block. Codes and scale belong to the next matmul's input.
template <class T>
struct Buffers {
  int8_t* codes;
  float* scale;
  int64_t* lengths;
  T *delta, *qkv, *q, *mixed, *gate_up;

  Buffers(Arena& arena, const DecoderBlock* blocks, int64_t count, const DecoderRows& rows) {
    int64_t inputs = 0, fused = 0, attention = 0, mlp = 0;
    for (const DecoderBlock* b = blocks; b < blocks + count; ++b) {
      inputs = std::max({inputs, b->qkv.k, b->o.k, b->down.k});
      fused = std::max(fused, b->qkv.n);
      attention = std::max(attention, b->o.k);
      mlp = std::max(mlp, b->gate_up.n);
    }
    codes = arena.take<int8_t>(rows.n * inputs);
    scale = arena.take<float>(rows.n);
    lengths = arena.take<int64_t>(rows.n);
    delta = arena.take<T>(rows.n * rows.hidden);
    qkv = arena.take<T>(rows.n * fused);
    q = arena.take<T>(rows.n * attention);
    mixed = arena.take<T>(rows.n * attention);
    gate_up = arena.take<T>(rows.n * mlp);
  }
};

template <class T>
class Runner {
 public:
  Runner(const Parallel& parallel, const DecoderRows& rows, const Buffers<T>& buffers, T* stream)
      : parallel_(parallel), rows_(rows), b_(buffers), stream_(stream) {}

  // delta: what the block before has still to add to the stream, or nullptr.
  void run(const DecoderBlock& block, const T* delta) {
    normalize(block.input_norm, block.input_eps, block.bits, delta);
    linear(block.qkv, b_.qkv);
    attend(block);
    quantize_rows(parallel_, b_.mixed, rows_.n, block.o.k, block.bits, false, b_.codes, b_.scale);
    linear(block.o, b_.delta);
    normalize(block.post_norm, block.post_eps, block.bits, b_.delta);
    linear(block.gate_up, b_.gate_up);
    const int64_t width = block.gate_up.n / 2;
    silu_mul_rows(parallel_, b_.gate_up, b_.gate_up + width, 2 * width, rows_.n, width,
                  RowOutput<T>{nullptr, b_.codes, b_.scale, block.bits});
    linear(block.down, b_.delta);
  }

  void add_to_stream(const T* delta) {
    const int64_t columns = rows_.hidden;
    parallel_.rows(rows_.n, 3 * columns * static_cast<int64_t>(sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin * columns; i < end * columns; ++i)
                       stream_[i] = from_float<T>(to_float(stream_[i]) + to_float(delta[i]));
                   });
  }

 private:
  // Codes of the normed stream, after delta was added to it.
  void normalize(const float* weight, float eps, int bits, const T* delta) {
    rms_norm_rows(parallel_, stream_, delta, weight, rows_.n, rows_.hidden, eps,
                  delta == nullptr ? nullptr : stream_,
                  RowOutput<T>{nullptr, b_.codes, b_.scale, bits});
  }

  void linear(const IntLinear& w, T* y) {
    const QuantizedMatmul matmul({b_.codes, b_.scale, rows_.n, w.n, w.k, w.panels, w.layout,
                                  w.scale, w.group_size, w.bias, out_type_of<T>(), y,
                                  w.multiplier});
    run_parallel(parallel_, matmul, rows_.n, panel_bytes(w.layout, w.k));
  }

  void attend(const DecoderBlock& block) {
    const KvCache& cache = block.cache;
    const int64_t d = cache.head_dim, row = block.qkv.n;
    const T* k = b_.qkv + rows_.heads * d;
    const T* v = k + cache.heads * d;
    append_rows(parallel_, cache, k, v, row, rows_.n, rows_.tables, rows_.slots, rows_.positions);
    rope_rows(parallel_, b_.qkv, row, rows_.n, rows_.heads, d, rows_.tables, rows_.positions, b_.q);
    attend_rows(parallel_, cache, b_.q, rows_.n, rows_.heads, rows_.tables, rows_.slots, b_.lengths,
                rows_.scaling, b_.mixed);
  }

  const Parallel& parallel_;
  const DecoderRows& rows_;
  const Buffers<T>& b_;
  T* stream_;
};

}  // namespace

template <class T>
void run_decoder_blocks(const Parallel& parallel, const DecoderBlock* blocks, int64_t count,
                        const DecoderRows& rows, T* stream) {
  if (rows.n == 0 || count == 0) return;
  Arena size(nullptr);
  Buffers<T>(size, blocks, count, rows);
  Arena arena(t_arena.get(size.used()));
  const Buffers<T> buffers(arena, blocks, count, rows);
  for (int64_t i = 0; i < rows.n; ++i) buffers.lengths[i] = rows.positions[i] + 1;
  Runner<T> runner(parallel, rows, buffers, stream);
  for (int64_t i = 0; i < count; ++i) runner.run(blocks[i], i == 0 ? nullptr : buffers.delta);
  runner.add_to_stream(buffers.delta);
}

#define LLMQAT_INSTANTIATE(T)                                                        \
  template void run_decoder_blocks<T>(const Parallel&, const DecoderBlock*, int64_t, \
                                      const DecoderRows&, T*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
