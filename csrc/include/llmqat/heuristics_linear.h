// How the CUDA linears cut their work: pure host and device functions, shared by the launchers, the
// kernels, the bindings and the tests.
//
// The unit of work is one stage: the k of one pipeline step times the channels of one block of
// threads. Stage s of tile t is unit t * stages + s. Integer partial sums add up in any order to
// the same bits, so the units are dealt out evenly (stream-K): block c of B takes units
// [U c / B, U (c + 1) / B). Float sums are cut by the shape alone: never by M.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr int kLinearTiles = 4;  // tiles of 32 channels, one a warp, in a block
inline constexpr int kLinearThreads = kLinearTiles * 32;
inline constexpr int kLinearTokens = 64;      // most tokens of one launch: 8 MMA columns of 8
inline constexpr int kLinearBlocksPerSm = 2;  // persistent blocks
// A block takes at least so many stages: below, adding up the partial sums costs more than
// the stages do (16 KiB of weights each).
inline constexpr int64_t kLinearMinStages = 2;
// A float split takes at least so many stages; it stores its whole tile of partial sums.
inline constexpr int64_t kLinearMinFloatStages = 4;

// The workspace: tickets of 2048 tiles, then a slot of int32 partial sums for each block of
// threads: 2 halves of the channels x 8 token tiles x 4 values a thread.
inline constexpr int64_t kTicketBytes = 8192;
inline constexpr int64_t kSlotValues = kLinearThreads * 2 * (kLinearTokens / 8) * 4;

LLMQAT_HD int64_t linear_workspace_bytes(int64_t sms) {
  return kTicketBytes + sms * kLinearBlocksPerSm * kSlotValues * 4;
}

// MMA columns of 8 tokens that the kernel for m tokens has: 1, 2, 4 or 8.
LLMQAT_HD int linear_token_tiles(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

LLMQAT_HD int64_t linear_first_unit(int64_t units, int64_t blocks, int64_t block) {
  return units / blocks * block + units % blocks * block / blocks;
}

// The block that owns a unit: the last one whose first unit is not beyond it.
LLMQAT_HD int64_t linear_owner(int64_t units, int64_t blocks, int64_t unit) {
  return ((unit + 1) * blocks - 1) / units;
}

// Persistent blocks for `units` on a device with `sms` multiprocessors.
LLMQAT_HD int64_t linear_blocks(int64_t units, int64_t sms) {
  const int64_t most = sms * kLinearBlocksPerSm;
  const int64_t wanted = (units + kLinearMinStages - 1) / kLinearMinStages;
  return wanted < most ? (wanted < 1 ? 1 : wanted) : most;
}

// Parts that the stages of each of `tile_blocks` groups of tiles are cut into, for float sums.
LLMQAT_HD int64_t linear_float_splits(int64_t tile_blocks, int64_t stages, int64_t sms) {
  const int64_t by_device = sms * kLinearBlocksPerSm / tile_blocks;
  const int64_t by_stages = stages / kLinearMinFloatStages;
  const int64_t splits = by_device < by_stages ? by_device : by_stages;
  return splits < 1 ? 1 : splits;
}

}  // namespace llmqat
