// Reductions over the threads that share one row.
#pragma once

#include "llmqat/arch.cuh"

namespace llmqat {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

// The maximum of v over the block's x dimension, in every thread. Every warp of the block must call
// it, unless blockDim.x is one warp: then each warp (each threadIdx.y) is on its own and no barrier
// is used.
LLMQAT_DEVICE uint32_t row_max_u32(uint32_t v) {
  v = redux_max_u32(v);
  if (blockDim.x == kWarp) return v;
  LLMQAT_STATIC_SHARED(uint32_t, warp_max, kMaxWarps);
  const unsigned lane = threadIdx.x % kWarp;
  if (lane == 0) warp_max[threadIdx.x / kWarp] = v;
  sync_block();
  return redux_max_u32(lane < blockDim.x / kWarp ? warp_max[lane] : 0u);
}

}  // namespace llmqat
