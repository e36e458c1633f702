// What flows into a linear on packed weights: activations and weights, through a ring of stages in
// shared memory. Shared by the integer and the float kernels.
//
// Weights take that way too, although each lane copies just what it reads itself: a ring in shared
// memory is waited for one stage at a time, while ptxas puts all loads to registers on one
// scoreboard, so that a warp had to wait for its latest load before it could use its first.
#pragma once

#include <climits>

#include "cuda/quantized_linear.h"
#include "llmqat/arch.cuh"
#include "llmqat/fragment_layout.h"
#include "llmqat/heuristics_linear.h"

namespace llmqat {

// What a kernel gets: the problem and what the launcher derived from it.
struct LinearArgs {
  LlmqatLinear p;
  int64_t tile_bytes;  // of one tile's weights
  int tiles;           // of 32 channels
  int k_blocks;        // of 128 k, of one tile
  int groups;          // of the tiles that a block works on at once
  int stages;          // of one group
  int rows;            // of a, and their bytes
  int row_bytes;
  bool aligned;  // rows of a may be copied 16 bytes at a time
  // Integer kernels: the plan. A block has cut_units / blocks units of the cut groups, the first
  // cut_units % blocks have one more (a division in the kernel would delay its first load).
  int whole, cut, block_units, more_units;
  int splits;  // float kernels: parts of each group
};

// A ring of stages: of a stage each warp has the weights of 128 k, and the block the activations.
// Rows of activations follow each other without a gap; a row of odd number has the 16-byte chunks
// whose numbers differ in bit kFlip exchanged, so that the two rows that eight lanes read at once
// fall on different banks.
template <bool kNibbles, int kTokenTiles, int kElementBytes, int kWays_, int kFlip>
struct LinearRing {
  static constexpr int kWays = kWays_;  // warps that share the k of a tile
  static constexpr int kGroupTiles = kLinearTiles / kWays;
  static constexpr int kLoads = (kNibbles ? 1 : 2) * (kBlockK / kFragmentK);  // of a lane
  static constexpr int kWarpBytes = kLoads * kFragmentBytes;
  static constexpr int kWeightBytes = kLinearTiles * kWarpBytes;
  static constexpr int kWarpRowBytes = kBlockK * kElementBytes;
  static constexpr int kRowBytes = kWays * kWarpRowBytes;
  static constexpr int kRows = kTokenTiles * 8;
  static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
  // Two blocks fit an SM of sm_80 (164 KiB), of few tokens three an SM of sm_90 (228 KiB). Four
  // stages under way are 32 KiB of 4-bit weights a block, more than an SM needs.
  static constexpr int kMost = 76 * 1024 / kStageBytes;
  static constexpr int kBuffers = kMost < 5 ? kMost : 5;
  static constexpr int kBytes = kBuffers * kStageBytes;
  static_assert(kBuffers >= 3);

  // Where a 16-byte chunk of a row lies in it.
  LLMQAT_DEVICE static int place(int row, int chunk) { return (chunk ^ row % 2 * kFlip) * 16; }

  // The fragments of this lane: kFragmentBytes apart.
  LLMQAT_DEVICE static const unsigned char* weights(const unsigned char* buffer, int warp,
                                                    int lane) {
    return buffer + warp * kWarpBytes + lane * kLoadBytes;
  }

  // 16 bytes of activations: `chunk` of this warp's part of the first row that this lane reads.
  // The rows of the other column tiles are 8 * kRowBytes apart.
  LLMQAT_DEVICE static const unsigned char* activations(const unsigned char* buffer, int warp,
                                                        int lane, int chunk) {
    const int row = lane / 4;
    return buffer + kWeightBytes + row * kRowBytes + warp % kWays * kWarpRowBytes +
           place(row, chunk);
  }
};

// What fills a ring: the stages of groups, one after another. What no stage changes is kept in
// registers, so that a stage costs few instructions besides its copies.
template <class Ring>
class LinearFeed {
 public:
  LLMQAT_DEVICE LinearFeed(const LinearArgs& args, unsigned char* ring, int group, int stage)
      : args_(args) {
    const int thread = static_cast<int>(threadIdx.x);
    weights_to_ = ring + thread / 32 * Ring::kWarpBytes + thread % 32 * kLoadBytes;
    row_ = thread / kRowChunks;
    const int chunk = thread % kRowChunks;
    row_from_ = static_cast<const unsigned char*>(args.p.a) +
                static_cast<int64_t>(row_) * args.row_bytes + chunk * 16;
    row_to_ = ring + Ring::kWeightBytes + row_ * Ring::kRowBytes + Ring::place(row_, chunk);
    in_row_ = args.row_bytes - chunk * 16;
    seek(group, stage);
  }

  LLMQAT_DEVICE void seek(int group, int stage) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int tile = group * Ring::kGroupTiles + warp / Ring::kWays;
    const int block = stage * Ring::kWays + warp % Ring::kWays;
    weights_from_ = args_.p.w + tile * args_.tile_bytes +
                    static_cast<int64_t>(block) * Ring::kWarpBytes + lane * kLoadBytes;
    blocks_left_ = tile < args_.tiles ? args_.k_blocks - block : 0;
    column_ = stage * Ring::kRowBytes;
  }

  // Waits for the kernels before this one, while the first stage comes from memory to L2.
  LLMQAT_DEVICE void prefetch_and_wait() const {
    const bool begins_line = threadIdx.x % (128 / kLoadBytes) == 0;
#pragma unroll
    for (int slot = 0; slot < Ring::kLoads; ++slot) {
      if (begins_line && blocks_left_ > 0) prefetch_l2(weights_from_ + slot * kFragmentBytes);
    }
    griddepcontrol_wait();
  }

  // Starts the copies of a stage to `buffer` bytes from the ring's start, and goes on to the next
  // of the group. What lies beyond m, n or k becomes 0.
  LLMQAT_DEVICE void issue(int buffer) {
    const bool there = blocks_left_ > 0;
#pragma unroll
    for (int slot = 0; slot < Ring::kLoads; ++slot) {
      cp_async_16(weights_to_ + buffer + slot * kFragmentBytes,
                  weights_from_ + slot * kFragmentBytes, there);
    }
    if (args_.aligned) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        cp_async_16(row_to_ + buffer + i * kRows * Ring::kRowBytes, row_from(i), bytes(i) > 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) {
        store_16(row_to_ + buffer + i * kRows * Ring::kRowBytes, gather(row_from(i), bytes(i)));
      }
    }
    weights_from_ += Ring::kWays * Ring::kWarpBytes;
    blocks_left_ -= Ring::kWays;
    column_ += Ring::kRowBytes;
  }

 private:
  static constexpr int kRowChunks = Ring::kRowBytes / 16;
  static constexpr int kRows = kLinearThreads / kRowChunks;  // that the block copies at once
  static constexpr int kCopies = Ring::kRows / kRows;
  static_assert(kRows % 2 == 0 && Ring::kRows % kRows == 0, "a thread's rows have one parity");

  // Of the thread's copy i: where it begins, and how many bytes lie within the row.
  LLMQAT_DEVICE const unsigned char* row_from(int i) const {
    return row_from_ + static_cast<int64_t>(i * kRows) * args_.row_bytes + column_;
  }
  LLMQAT_DEVICE int bytes(int i) const {
    return row_ + i * kRows < args_.rows ? in_row_ - column_ : 0;
  }

  // Any address, any number of bytes.
  LLMQAT_DEVICE static Word4 gather(const unsigned char* from, int bytes) {
    Word4 word{{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < bytes) word.v[i / 4] |= static_cast<uint32_t>(from[i]) << (i % 4 * 8);
    }
    return word;
  }

  const LinearArgs& args_;
  unsigned char* weights_to_;
  unsigned char* row_to_;
  const uint8_t* weights_from_;
  const unsigned char* row_from_;
  int row_, in_row_;  // the thread's first row, and its bytes from the thread's chunk on
  int blocks_left_;   // of 128 k, of this warp's tile
  int column_;        // in bytes
};

// Whether this block is the last of those that together take `all` tickets of a tile. Every thread
// must call it after its writes to the workspace; a last block may read what the others wrote. One
// thread fences for all: a fence covers what the barrier before it has ordered.
LLMQAT_DEVICE bool is_last_arriver(uint32_t* ticket, uint32_t mine, uint32_t all, int32_t* flag) {
  sync_block();
  if (threadIdx.x == 0) {
    thread_fence();
    const bool last = atomic_add_u32(ticket, mine) + mine == all;
    if (last) thread_fence();
    if (last) *ticket = 0;
    *flag = last ? 1 : 0;
  }
  sync_block();
  return *flag != 0;
}

// The plan is not made yet. false if its stages or the bytes of a row are beyond 32 bits.
inline bool linear_args(const LlmqatLinear& problem, int element_bytes, int ways,
                        LinearArgs& args) {
  const int64_t tiles = layout_tiles(problem.n), k_blocks = layout_blocks(problem.k);
  const int64_t group_tiles = kLinearTiles / ways;
  const int64_t groups = (tiles + group_tiles - 1) / group_tiles;
  const int64_t stages = (k_blocks + ways - 1) / ways;
  const int64_t row_bytes = problem.k * element_bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(problem.a) % 16 == 0 && row_bytes % 16 == 0;
  args = {.p = problem,
          .tile_bytes = k_blocks * block_bytes(problem.nibbles),
          .tiles = static_cast<int>(tiles),
          .k_blocks = static_cast<int>(k_blocks),
          .groups = static_cast<int>(groups),
          .stages = static_cast<int>(stages),
          .rows = static_cast<int>(problem.m),
          .row_bytes = static_cast<int>(row_bytes),
          .aligned = aligned,
          .whole = 0,
          .cut = 0,
          .block_units = 0,
          .more_units = 0,
          .splits = 1};
  // A stage may reach 4 * 128 columns beyond the end of a row.
  return groups * stages <= INT_MAX / kLinearTiles && row_bytes <= INT_MAX - 4096;
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
