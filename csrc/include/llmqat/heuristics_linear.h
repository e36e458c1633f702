// How the CUDA linears cut their work: pure host and device functions, shared by the launchers, the
// kernels, the bindings and the tests.
//
// A group is what a block of threads has sums for: 32 channels a warp, or the same 32 in each of
// its four warps, which then share out k (linear_ways). A stage is one step of the pipeline: 128 k
// a warp. Integer sums add up in any order to the same bits, so an integer linear may cut groups
// anywhere (stream-K); float sums are cut by the shape alone: never by M.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr int kLinearTiles = 4;  // warps of a block; each has 32 channels
inline constexpr int kLinearThreads = kLinearTiles * 32;
inline constexpr int kLinearTokens = 64;  // most tokens of one launch: 8 MMA columns of 8
// Adding up a group that several blocks share takes an SM about 2,000 clocks: partial sums, fence,
// ticket, fence, sums, one after another. It could read so many bytes of weights meanwhile.
inline constexpr int64_t kLinearSharingBytes = 32768;

// Blocks of one SM at most: the workspace has slots for 16 columns of 8 tokens an SM.
inline constexpr int kLinearMostBlocksPerSm = 8;
inline constexpr int kLinearSlotColumns = 16;
// A float linear fills the device with so many; they decide its bits, so nothing may change them.
inline constexpr int kLinearFloatBlocksPerSm = 2;
// A float split takes at least so many k; it stores its whole tile of partial sums.
inline constexpr int64_t kLinearMinFloatStages = 4;  // of two times 128 k

// The workspace: tickets of 2048 groups, then a slot of partial sums for each block of threads:
// 2 halves of the channels x 4 values a thread for each column of 8 tokens.
inline constexpr int64_t kTicketBytes = 8192;
inline constexpr int64_t kColumnValues = kLinearThreads * 2 * 4;

LLMQAT_HD int64_t linear_workspace_bytes(int64_t sms) {
  return kTicketBytes + sms * kLinearSlotColumns * kColumnValues * 4;
}

// MMA columns of 8 tokens that the kernel for m tokens has: 1, 2, 4 or 8.
LLMQAT_HD int linear_token_tiles(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

// Warps of a block that take the k of the same 32 channels in turns. Four make groups so small that
// whole ones fill a device, and nothing is added up in memory; but every 32 channels read the
// activations, so that beyond 8 tokens these would be as many bytes as the weights.
LLMQAT_HD constexpr int linear_ways(int token_tiles) { return token_tiles == 1 ? kLinearTiles : 1; }

// Blocks an SM of an integer linear, `resident` of which fit on one. A third hides what a block
// does between its loads; with 64 tokens the tensor cores are busy with two. `wanted` (0: none) is
// the user's choice.
LLMQAT_HD int64_t linear_blocks_per_sm(int token_tiles, int64_t resident, int64_t wanted) {
  const int64_t slots = kLinearSlotColumns / token_tiles;
  const int64_t most = slots < kLinearMostBlocksPerSm ? slots : kLinearMostBlocksPerSm;
  if (wanted > 0) return wanted < most ? wanted : most;
  const int64_t useful = token_tiles <= 4 ? 3 : 2;
  return resident < 1 ? 1 : resident < useful ? resident : useful;
}

// Who computes what: the first `cut` groups are shared out evenly by their stages, then each block
// has `whole` groups of its own, during which the sums of the cut ones are added up.
struct LinearPlan {
  int64_t blocks, whole, cut;  // groups == blocks * whole + cut
};

LLMQAT_HD LinearPlan linear_plan(int64_t groups, int64_t stages, int64_t stage_bytes, int64_t sms,
                                 int64_t per_sm) {
  const int64_t units = groups * stages, most = sms * per_sm;
  const int64_t sharing = kLinearSharingBytes / stage_bytes;
  int64_t blocks = most;
  if (groups <= most) {
    // In stages of the SM that has most to do.
    const int64_t alone = (groups + sms - 1) / sms * stages;
    const int64_t shared = (units + sms - 1) / sms + sharing;
    // A block takes at least as much as sharing costs.
    const int64_t worth = (units + sharing - 1) / sharing;
    if (worth < blocks) blocks = worth;
    if (alone <= shared || blocks < groups) blocks = groups;
  }
  return {blocks, groups / blocks, groups % blocks};
}

// The first of `stages` that part `split` of `splits` has, of float sums.
LLMQAT_HD int linear_float_cut(int stages, int splits, int split) {
  return stages / splits * split + stages % splits * split / splits;
}

// Parts that the `stages` (of two times 128 k) of each group are cut into, for float sums.
LLMQAT_HD int64_t linear_float_splits(int64_t groups, int64_t stages, int64_t sms) {
  const int64_t by_device = sms * kLinearFloatBlocksPerSm / groups;
  const int64_t by_stages = stages / kLinearMinFloatStages;
  const int64_t splits = by_device < by_stages ? by_device : by_stages;
  return splits < 1 ? 1 : splits;
}

}  // namespace llmqat
