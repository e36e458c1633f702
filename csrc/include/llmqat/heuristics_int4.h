// How the product with integer group scales (csrc/cuda/int4_linear.cu) is cut into blocks of
// threads. Pure functions of the shape and the device, shared by launcher, kernel, binding, tests.
//
// Partial sums are integers: no cut of k or of the tokens changes a bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr int kInt4StageK = 256;  // k of a pipeline stage: rows of 128 bytes of 4-bit codes
inline constexpr int kInt4StepK = 64;    // k of one MMA on 4-bit codes; groups are multiples of it
inline constexpr int64_t kInt4MinStages = 2;  // of one split: fewer cost more to add up than to run
inline constexpr int64_t kInt4MaxStages = 64;  // of one split: its multipliers stay below 33 KiB
inline constexpr int64_t kInt4BlocksPerSm = 2;

// How one product runs.
struct Int4Plan {
  int token_tile;  // tokens of a block: 8 or 64; 0: the kernel for any layout
  int splits;      // parts of k, one a block
  int64_t tiles;   // (channel, token) tiles
};

// Channels of a block: four warps of one or two MMA rows of 16.
constexpr int int4_channel_tile(int token_tile) { return token_tile == 8 ? 64 : 128; }

LLMQAT_HD int64_t int4_stages(int64_t k) { return (k + kInt4StageK - 1) / kInt4StageK; }

// `regular`: packed weights, 16-byte aligned, and groups of whole steps.
inline Int4Plan int4_plan(int64_t m, int64_t n, int64_t k, bool regular, int64_t sms) {
  if (!regular || m == 0 || n == 0 || k == 0) return {0, 1, 0};
  const int tokens = m <= 8 ? 8 : 64;
  const int channels = int4_channel_tile(tokens);
  const int64_t tiles = ((n + channels - 1) / channels) * ((m + tokens - 1) / tokens);
  const int64_t stages = int4_stages(k);
  const int64_t wanted = std::max<int64_t>(1, sms * kInt4BlocksPerSm / tiles);
  const int64_t most = std::max<int64_t>(1, stages / kInt4MinStages);
  const int64_t least = (stages + kInt4MaxStages - 1) / kInt4MaxStages;
  const int64_t splits = std::max(least, std::min(wanted, most));
  return {tokens, static_cast<int>(splits), tiles};
}

// Bytes of partial sums that the blocks of a tile hand over; none if nothing is split.
inline int64_t int4_workspace_bytes(const Int4Plan& plan) {
  if (plan.splits == 1) return 0;
  return plan.tiles * plan.splits * plan.token_tile * int4_channel_tile(plan.token_tile) * 4;
}

}  // namespace llmqat
