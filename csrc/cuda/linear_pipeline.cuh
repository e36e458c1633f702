// What flows into a linear on packed weights: activations through shared memory, weights through
// registers. Shared by the integer and the float kernels.
#pragma once

#include <climits>

#include "cuda/quantized_linear.h"
#include "llmqat/arch.cuh"
#include "llmqat/fragment_layout.h"
#include "llmqat/heuristics_linear.h"

namespace llmqat {

inline constexpr int kLoads = 8;  // weight loads a lane keeps in flight: one stage
inline constexpr int kStageWeightBytes = kLoads * kFragmentBytes;  // of one tile

// What a kernel gets: the problem and what the launcher derived from it.
struct LinearArgs {
  LlmqatLinear p;
  int64_t tile_bytes;  // of one tile's weights
  int tiles;           // of 32 channels
  int stages;          // of one tile
  int tile_blocks;     // groups of kLinearTiles tiles
  int splits;          // of the stages; float kernels only
  bool last_is_half;   // the last stage of a tile has half of its weights
  bool aligned;        // rows of a may be copied 16 bytes at a time
};

// The weights of one warp, one stage after another, across tiles. Loads are never conditional: a
// condition would make registers wait for data that nobody needs yet. What lies beyond the weight
// is loaded from its start; such products meet activations of 0 or are not stored.
class WeightStream {
 public:
  LLMQAT_DEVICE WeightStream(const LinearArgs& args, int tile_block, int stage, int warp, int lane)
      : args_(args),
        start_(args.p.w + lane * kLoadBytes),
        tile_(tile_block * kLinearTiles + warp),
        stage_(stage) {
    at_ = tile_start() + static_cast<int64_t>(stage_) * kStageWeightBytes;
    aim();
  }

  LLMQAT_DEVICE Word4 load(int slot) const {
    return load_streaming_16((slot < kLoads / 2 ? first_ : second_) +
                             slot % (kLoads / 2) * kFragmentBytes);
  }

  LLMQAT_DEVICE void advance() {
    at_ += kStageWeightBytes;
    if (++stage_ == args_.stages) {
      stage_ = 0;
      tile_ += kLinearTiles;
      at_ = tile_start();
    }
    aim();
  }

 private:
  LLMQAT_DEVICE const uint8_t* tile_start() const { return start_ + tile_ * args_.tile_bytes; }

  LLMQAT_DEVICE void aim() {
    const bool there = tile_ < args_.tiles;
    first_ = there ? at_ : start_;
    // The last stage of 4-bit tiles may be half: its second half has no weights.
    const bool half = !there || (stage_ + 1 == args_.stages && args_.last_is_half);
    second_ = half ? first_ : first_ + kStageWeightBytes / 2;
  }

  const LinearArgs& args_;
  const uint8_t* start_;
  const uint8_t* at_;
  const uint8_t* first_;
  const uint8_t* second_;
  int tile_, stage_;
};

// Rows of activations in a ring of kBuffers stages of kRowBytes each. Rows lie kPad bytes apart
// more, so that the eight rows that a warp reads at once fall on different banks.
template <int kTokenTiles, int kRowBytes_, int kPad, int kBuffers_>
struct ActivationRing {
  static constexpr int kRowBytes = kRowBytes_, kBuffers = kBuffers_;
  static constexpr int kStride = kRowBytes + kPad;
  static constexpr int kBufferBytes = kTokenTiles * 8 * kStride;
  static constexpr int kBytes = kBuffers * kBufferBytes;

  // Starts the copy of stage `stage` into `buffer`; rows beyond m and columns beyond k become 0.
  LLMQAT_DEVICE static void issue(unsigned char* ring, int buffer, const LinearArgs& args,
                                  int stage, int element_bytes) {
    unsigned char* to = ring + buffer * kBufferBytes;
    const int64_t row_bytes = args.p.k * element_bytes;
    const int64_t column = static_cast<int64_t>(stage) * kRowBytes;
    const int thread = static_cast<int>(threadIdx.x);
    if (args.aligned) {
#pragma unroll
      for (int first = 0; first < kChunks; first += kLinearThreads) {
        const Chunk chunk(args, to, first + thread, column, row_bytes);
        if (chunk.exists) cp_async_16(chunk.to, chunk.from, chunk.bytes > 0);
      }
    } else {
#pragma unroll 1
      for (int first = 0; first < kChunks; first += kLinearThreads) {
        const Chunk chunk(args, to, first + thread, column, row_bytes);
        if (chunk.exists) store_16(chunk.to, chunk.gather());
      }
    }
  }

 private:
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kChunks = kTokenTiles * 8 * kRowChunks;

  // 16 bytes of a stage: where they come from and go to, and how many lie within the row.
  struct Chunk {
    bool exists;
    unsigned char* to;
    const unsigned char* from;
    int64_t bytes;

    LLMQAT_DEVICE Chunk(const LinearArgs& args, unsigned char* stage, int number, int64_t column,
                        int64_t row_bytes) {
      const int row = number / kRowChunks, at = number % kRowChunks * 16;
      exists = kChunks % kLinearThreads == 0 || number < kChunks;
      to = stage + row * kStride + at;
      bytes = row < args.p.m ? row_bytes - column - at : 0;
      from = static_cast<const unsigned char*>(args.p.a);
      if (bytes > 0) from += row * row_bytes + column + at;
    }

    // Any address, any number of bytes.
    LLMQAT_DEVICE Word4 gather() const {
      Word4 word{{0, 0, 0, 0}};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i < bytes) word.v[i / 4] |= static_cast<uint32_t>(from[i]) << (i % 4 * 8);
      }
      return word;
    }
  };
};

// Whether this block is the last of those that together take `all` tickets of a tile. Every thread
// must call it after its writes to the workspace; a last block may read what the others wrote.
LLMQAT_DEVICE bool is_last_arriver(uint32_t* ticket, uint32_t mine, uint32_t all, int32_t* flag) {
  thread_fence();
  sync_block();
  if (threadIdx.x == 0) {
    const bool last = atomic_add_u32(ticket, mine) + mine == all;
    if (last) *ticket = 0;
    *flag = last ? 1 : 0;
  }
  sync_block();
  const bool last = *flag != 0;
  thread_fence();
  return last;
}

// false if the problem is beyond 32-bit unit numbers.
inline bool linear_args(const LlmqatLinear& problem, int element_bytes, LinearArgs& args) {
  const int64_t tiles = layout_tiles(problem.n);
  const int64_t tile_blocks = (tiles + kLinearTiles - 1) / kLinearTiles;
  const int64_t tile_bytes = layout_blocks(problem.k) * block_bytes(problem.nibbles);
  const int64_t stages = (tile_bytes + kStageWeightBytes - 1) / kStageWeightBytes;
  const int64_t row_bytes = problem.k * element_bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(problem.a) % 16 == 0 && row_bytes % 16 == 0;
  args = {.p = problem,
          .tile_bytes = tile_bytes,
          .tiles = static_cast<int>(tiles),
          .stages = static_cast<int>(stages),
          .tile_blocks = static_cast<int>(tile_blocks),
          .splits = 1,
          .last_is_half = tile_bytes % kStageWeightBytes != 0,
          .aligned = aligned};
  return tile_blocks * stages <= INT_MAX / kLinearTiles;
}

// Rows [first, first + rows) of a problem, whose outputs have `columns` columns.
inline LlmqatLinear linear_rows(const LlmqatLinear& problem, int64_t first, int64_t rows,
                                int element_bytes) {
  const int64_t columns = problem.silu_mul ? problem.n / 2 : problem.n;
  const int64_t out = first * columns * (problem.dtype == LLMQAT_FLOAT32 ? 4 : 2);
  LlmqatLinear part = problem;
  part.m = rows;
  part.a = static_cast<const unsigned char*>(problem.a) + first * problem.k * element_bytes;
  part.a_scale = problem.a_scale == nullptr ? nullptr : problem.a_scale + first;
  part.y = static_cast<unsigned char*>(problem.y) + out;
  if (problem.residual != nullptr) {
    part.residual = static_cast<const unsigned char*>(problem.residual) + out;
  }
  return part;
}

}  // namespace llmqat
