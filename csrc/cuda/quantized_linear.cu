// integer_linear: int8 activations times 4-bit or int8 weights in fragment order, for few tokens.
//
// Math:     spec 7; 14 with silu_mul. 4-bit: a byte is 16 * hi + (lo + 8), hi and lo of two
//           channels at one k. raw = sum a * byte and low = sum a * (lo + 8) give both exactly:
//           hi = (raw - low) / 16, lo = low - 8 * sum a. One AND for eight weights.
// Shapes:   a[m, k] int8, w: fragment_layout.h, y[m, n] (or [m, n / 2]); 64 rows a launch, more
//           rows are more launches.
// Dtypes:   int8 in, int32 sums, fp32 scales; y, bias, residual fp32, bf16 or fp16.
// Tiling:   weights are the MMA's 16 rows, tokens its 8 columns: one token costs one column tile,
//           not sixteen rows. A warp owns 32 channels, a block of 4 warps 128: they share the
//           activations, 256 (4-bit) or 128 (int8) k a stage, three stages of cp.async. Weights go
//           from memory to registers, 8 loads of 16 bytes a lane: 4 KiB a warp, 32 KiB an SM
//           under way. Two persistent blocks an SM, units dealt evenly (heuristics_linear.h).
// Cost:     memory-bound for m <= 64: n * k / 2 (or n * k) bytes. 4096 x 4096 4-bit, 8.4 MB: 5.4 us
//           at 1.55 TB/s (A100), 2.5 us at 3.35 TB/s (H100).
// Numerics: exact in any order. |raw| <= 128 * 128 * 131071 < 2^31 for every byte and code.
// Edges:    k tail: activations 0; n tail: channels dropped; NaN scale: its row is NaN.
// Limits:   sm_80 or newer; k <= 131071; one launch at a time on a workspace.
// Tests:    tests/emulator/test_quantized_linear.py, tests/kernels/test_fragment_layout.py
// Bench:    python -m benchmarks.run --op repacked_matmul --device cuda
#include <climits>

#include "cuda/linear_epilogue.cuh"

namespace llmqat {
namespace {

constexpr int64_t kMaxK = 131071;
static_assert(kMaxK * 128 * 128 <= INT_MAX, "raw sums of any byte and any int8 code fit int32");
constexpr int kBuffers = 3;

template <bool kNibbles, int kTokenTiles>
struct IntegerStage {
  static constexpr int kParts = kNibbles ? 1 : 2;  // weight loads for one k32 fragment
  static constexpr int kFragments = kLoads / kParts;
  static constexpr int kK = kFragments * kFragmentK;
  static constexpr int kPad = 64;  // a warp reads 64 bytes of two rows at a time: 128 apart by bank
  using Ring = ActivationRing<kTokenTiles, kK, kPad, kBuffers>;
  static constexpr int kSums = (kTokenTiles + kLinearTiles - 1) / kLinearTiles;
  // After the ring: sums of the activations, and the last arriver's flag.
  static constexpr int kSharedBytes = Ring::kBytes + (kTokenTiles * 8 + 4) * 4;

  int32_t acc[2][kTokenTiles][4];  // 4-bit: raw and low; int8: the two halves
  int32_t sum[kSums];              // of the activations of column tiles warp, warp + 4

  LLMQAT_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[0][j][i] = acc[1][j][i] = 0;
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) sum[s] = 0;
  }

  // Both MMAs of one fragment of 4-bit weights, or one fragment of each half.
  LLMQAT_DEVICE void multiply(const Word4& w, int part, const Word4 (&a)[kTokenTiles], int odd) {
    uint32_t low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = w.v[i] & 0x0F0F0F0Fu;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const uint32_t columns[2] = {a[j].v[2 * odd], a[j].v[2 * odd + 1]};
      mma_m16n8k32_s8(acc[part][j], w.v, columns);
      if constexpr (kNibbles) mma_m16n8k32_s8(acc[1][j], low, columns);
    }
  }

  // The sums of the activations are shared work: each warp has some of the column tiles.
  LLMQAT_DEVICE void add_up(const unsigned char* rows, int warp) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const int j = s * kLinearTiles + warp;
      if (j >= kTokenTiles) break;
#pragma unroll
      for (int pair = 0; pair < kFragments / 2; ++pair) {
        const Word4 a = load_16(rows + j * 8 * Ring::kStride + pair * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[s] = dot4_s8(a.v[i], 0x01010101u, sum[s]);
      }
    }
  }

  // One stage from shared memory; the loads of the next follow as registers come free.
  LLMQAT_DEVICE void consume(const unsigned char* buffer, Word4 (&held)[kLoads],
                             const WeightStream& next, int warp, int lane) {
    const unsigned char* rows = buffer + lane / 4 * Ring::kStride + lane % 4 * 16;
#pragma unroll
    for (int pair = 0; pair < kFragments / 2; ++pair) {
      Word4 a[kTokenTiles];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        a[j] = load_16(rows + j * 8 * Ring::kStride + pair * 64);
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int slot = (pair * 2 + odd) * kParts + part;
          multiply(held[slot], part, a, odd);
          held[slot] = next.load(slot);
        }
      }
    }
    if constexpr (kNibbles) add_up(rows, warp);
  }

  // 4-bit: raw and low become the sums of both halves.
  LLMQAT_DEVICE void separate(int32_t* shared_sums, int warp, int lane) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      int32_t total = sum[s] + shuffle_xor(sum[s], 1);
      total += shuffle_xor(total, 2);
      const int j = s * kLinearTiles + warp;
      if (lane % 4 == 0 && j < kTokenTiles) shared_sums[j * 8 + lane / 4] = total;
    }
    sync_block();
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[0][j][i] = (acc[0][j][i] - acc[1][j][i]) >> 4;
        acc[1][j][i] -= 8 * shared_sums[j * 8 + lane % 4 * 2 + i % 2];
      }
    }
  }

  // Adds this block's part of a tile to the workspace; the last block gets all of it and leaves
  // zeros.
  LLMQAT_DEVICE bool combine(const LinearArgs& args, int tile_block, int stages, int32_t* flag,
                             int lane) {
    const int units = args.tile_blocks * args.stages;
    const int64_t slot = linear_owner(units, gridDim.x, tile_block * args.stages);
    uint32_t* ticket = static_cast<uint32_t*>(args.p.workspace) + slot;
    int32_t* values =
        reinterpret_cast<int32_t*>(static_cast<unsigned char*>(args.p.workspace) + kTicketBytes) +
        slot * kSlotValues + threadIdx.x;
    const int64_t first_token = lane % 4 * 2;
#pragma unroll
    for (int v = 0; v < kTokenTiles * 8; ++v) {
      if (v / 8 * 8 + first_token + v % 2 >= args.p.m) continue;
      reduce_add_s32(values + v * kLinearThreads, acc[v / 4 % 2][v / 8][v % 4]);
    }
    if (!is_last_arriver(ticket, static_cast<uint32_t>(stages), static_cast<uint32_t>(args.stages),
                         flag)) {
      return false;
    }
#pragma unroll
    for (int v = 0; v < kTokenTiles * 8; ++v) {
      if (v / 8 * 8 + first_token + v % 2 >= args.p.m) continue;
      acc[v / 4 % 2][v / 8][v % 4] = values[v * kLinearThreads];
      values[v * kLinearThreads] = 0;
    }
    return true;
  }
};

template <bool kNibbles, int kTokenTiles>
LLMQAT_KERNEL_MIN_BLOCKS(kLinearThreads, kLinearBlocksPerSm)
integer_linear_kernel(const LinearArgs args) {
  using Stage = IntegerStage<kNibbles, kTokenTiles>;
  using Ring = typename Stage::Ring;
  LLMQAT_DYNAMIC_SHARED(shared);
  auto* sums = reinterpret_cast<int32_t*>(shared + Ring::kBytes);
  int32_t* flag = sums + kTokenTiles * 8;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  const int units = args.tile_blocks * args.stages, blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(linear_first_unit(units, blocks, block));
  int left = static_cast<int>(linear_first_unit(units, blocks, block + 1)) - first;
  if (left == 0) return;
  int tile_block = first / args.stages, stage = first % args.stages;

  WeightStream weights(args, tile_block, stage, warp, lane);
  Word4 held[kLoads];
#pragma unroll
  for (int slot = 0; slot < kLoads; ++slot) held[slot] = weights.load(slot);
  int ahead = stage, to_issue = left;
  int buffer = 0, fill = 0;
  const auto issue = [&] {
    if (to_issue > 0) Ring::issue(shared, fill, args, ahead, 1);
    cp_async_commit();
    --to_issue;
    if (++ahead == args.stages) ahead = 0;
    if (++fill == kBuffers) fill = 0;
  };
#pragma unroll
  for (int i = 0; i < kBuffers - 1; ++i) issue();

  Stage tile;
  tile.clear();
  int done = 0;  // stages of this tile
  for (;;) {
    cp_async_wait<kBuffers - 2>();
    sync_block();  // this stage is there for all; the one before it is free to be filled
    issue();
    if (left > 1) weights.advance();  // the last stage is loaded once more instead of one beyond
    tile.consume(shared + buffer * Ring::kBufferBytes, held, weights, warp, lane);
    if (++buffer == kBuffers) buffer = 0;
    --left, ++stage, ++done;
    if (stage < args.stages && left > 0) continue;

    if constexpr (kNibbles) tile.separate(sums, warp, lane);
    if (done == args.stages || tile.combine(args, tile_block, done, flag, lane)) {
      store_tile<true>(args, tile_block * kLinearTiles + warp, lane, tile.acc);
    }
    if (left == 0) return;
    tile.clear();
    done = 0;
    stage = 0;
    ++tile_block;
  }
}

template <bool kNibbles, int kTokenTiles>
void launch(const LinearArgs& args, void* stream) {
  using Stage = IntegerStage<kNibbles, kTokenTiles>;
  const int64_t units = static_cast<int64_t>(args.tile_blocks) * args.stages;
  const int64_t blocks = linear_blocks(units, args.p.sms);
  LLMQAT_LAUNCH_SHARED((integer_linear_kernel<kNibbles, kTokenTiles>),
                       dim3(static_cast<unsigned>(blocks)), dim3(kLinearThreads),
                       static_cast<size_t>(Stage::kSharedBytes), stream, args);
}

template <bool kNibbles>
int run(const LlmqatLinear& problem, void* stream) {
  for (int64_t first = 0; first < problem.m; first += kLinearTokens) {
    const int64_t left = problem.m - first;
    const int64_t rows = left < kLinearTokens ? left : kLinearTokens;
    LinearArgs args;
    if (!linear_args(linear_rows(problem, first, rows, 1), 1, args)) return cudaErrorInvalidValue;
    switch (linear_token_tiles(rows)) {
      case 1: launch<kNibbles, 1>(args, stream); break;
      case 2: launch<kNibbles, 2>(args, stream); break;
      case 4: launch<kNibbles, 4>(args, stream); break;
      default: launch<kNibbles, 8>(args, stream); break;
    }
    if (const int error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_integer_linear(const LlmqatLinear* problem, void* stream) {
  if (problem->m == 0 || problem->n == 0) return cudaSuccess;
  if (problem->k > llmqat::kMaxK ||
      problem->sms * llmqat::kLinearBlocksPerSm * 4 > llmqat::kTicketBytes) {
    return cudaErrorInvalidValue;
  }
  return problem->nibbles ? llmqat::run<true>(*problem, stream)
                          : llmqat::run<false>(*problem, stream);
}
