// integer_linear: int8 activations times 4-bit or int8 weights in fragment order, for few tokens.
//
// Math:     spec 7; 14 with silu_mul. 4-bit: a byte is 16 * hi + (lo + 8), hi and lo of two
//           channels at one k. raw = sum a * byte and low = sum a * (lo + 8) give both exactly:
//           hi = (raw - low) / 16, lo = low - 8 * sum a. One AND for eight weights.
// Shapes:   a[m, k] int8, w: fragment_layout.h, y[m, n] (or [m, n / 2]); 64 rows a launch, more
//           rows are more launches.
// Dtypes:   int8 in, int32 sums, fp32 scales; y, bias, residual fp32, bf16 or fp16.
// Tiling:   weights are the MMA's 16 rows, tokens its 8 columns: one token costs one column tile,
//           not sixteen rows. A warp has 32 channels and 128 k a stage: 2 (4-bit) or 4 KiB of
//           weights. Up to 8 tokens the 4 warps of a block share the k of the same channels, so
//           that tiles are small and whole ones fill the device; beyond, 128 channels share the
//           activations. 3 to 5 stages of cp.async (linear_pipeline.cuh). Groups that do not deal
//           out evenly are cut by stages (heuristics_linear.h).
// Cost:     memory-bound for m <= 64: n * k / 2 (or n * k) bytes. 4096 x 4096 4-bit, 8.4 MB: 5.4 us
//           at 1.55 TB/s (A100), 2.5 us at 3.35 TB/s (H100).
// Numerics: exact in any order. |raw| <= 128 * 128 * 131071 < 2^31 for every byte and code.
// Edges:    k tail: activations 0; n tail: channels dropped; NaN scale: its row is NaN.
// Limits:   sm_80 or newer; k <= 131071; one launch at a time on a workspace.
// Tests:    tests/emulator/test_quantized_linear.py, tests/kernels/test_linear_heuristics.py
// Bench:    python -m benchmarks.run --op repacked_matmul --device cuda
#include <climits>
#include <cstdlib>

#include "cuda/linear_epilogue.cuh"

namespace llmqat {
namespace {

constexpr int64_t kMaxK = 131071;
static_assert(kMaxK * 128 * 128 <= INT_MAX, "raw sums of any byte and any int8 code fit int32");

template <bool kNibbles, int kTokenTiles>
struct IntegerGroup {
  static constexpr int kWays = linear_ways(kTokenTiles);
  // Lanes read 64 bytes of a row at a time: rows of odd number begin with the other 64.
  using Ring = LinearRing<kNibbles, kTokenTiles, 1, kWays, 4>;
  static constexpr int kParts = kNibbles ? 1 : 2;  // weight loads for one k32 fragment
  static constexpr int kValues = kTokenTiles * 8;  // sums of a thread
  // Column tiles whose activations a warp adds up: of its own k, or its share of those of all.
  static constexpr int kSums = kWays > 1 ? kTokenTiles : (kTokenTiles + 3) / 4;
  static constexpr bool kExchanges = kNibbles || kWays > 1;

  // Behind the ring.
  struct Exchange {
    int32_t sums[kWays][kTokenTiles * 8];                      // of the activations
    Word4 values[kWays > 1 ? kWays - 1 : 1][kValues / 4][32];  // of the warps that do not lead
    int32_t flag;
  };
  static constexpr int kSharedBytes = Ring::kBytes + static_cast<int>(sizeof(Exchange));

  int32_t acc[2][kTokenTiles][4];  // 4-bit: raw and low; int8: the two halves
  int32_t sum[kSums];

  LLMQAT_DEVICE void clear() {
#pragma unroll
    for (int v = 0; v < kValues; ++v) value(v) = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) sum[s] = 0;
  }

  LLMQAT_DEVICE int32_t& value(int v) { return acc[v / 4 % 2][v / 8][v % 4]; }

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

  // The sums of the activations that four warps share: each has some of the column tiles.
  LLMQAT_DEVICE void add_up(const unsigned char* rows, int warp) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const int j = kWays > 1 ? s : s * kLinearTiles + warp;
      if (j < kTokenTiles) {
        const Word4 a = load_16(rows + j * 8 * Ring::kRowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[s] = dot4_s8(a.v[i], 0x01010101u, sum[s]);
      }
    }
  }

  LLMQAT_DEVICE void consume(const unsigned char* buffer, int warp, int lane) {
    const unsigned char* weights = Ring::weights(buffer, warp, lane);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const unsigned char* rows = Ring::activations(buffer, warp, lane, pair * 4 + lane % 4);
      Word4 a[kTokenTiles];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) a[j] = load_16(rows + j * 8 * Ring::kRowBytes);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int slot = (pair * 2 + odd) * kParts + part;
          multiply(load_16(weights + slot * kFragmentBytes), part, a, odd);
        }
      }
      if constexpr (kNibbles) add_up(rows, warp);
    }
  }

  // What other warps need of this one. A barrier follows.
  LLMQAT_DEVICE void publish(Exchange& exchange, int warp, int lane) {
    if constexpr (kNibbles) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        int32_t total = sum[s] + shuffle_xor(sum[s], 1);
        total += shuffle_xor(total, 2);
        const int j = kWays > 1 ? s : s * kLinearTiles + warp;
        if (lane % 4 == 0 && j < kTokenTiles) {
          exchange.sums[warp % kWays][j * 8 + lane / 4] = total;
        }
      }
    }
    if constexpr (kWays > 1) {
      if (warp == 0) return;
#pragma unroll
      for (int v = 0; v < kValues; v += 4) {
        Word4 word;
#pragma unroll
        for (int i = 0; i < 4; ++i) word.v[i] = static_cast<uint32_t>(value(v + i));
        store_16(&exchange.values[warp - 1][v / 4][lane], word);
      }
    }
  }

  // The sums of all warps, in the warp that leads; 4-bit: raw and low become those of both halves.
  LLMQAT_DEVICE void collect(const Exchange& exchange, int lane) {
    if constexpr (kWays > 1) {
#pragma unroll
      for (int v = 0; v < kValues; v += 4) {
#pragma unroll
        for (int way = 1; way < kWays; ++way) {
          const Word4 word = load_16(&exchange.values[way - 1][v / 4][lane]);
#pragma unroll
          for (int i = 0; i < 4; ++i) value(v + i) += static_cast<int32_t>(word.v[i]);
        }
      }
    }
    if constexpr (kNibbles) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[0][j][i] = (acc[0][j][i] - acc[1][j][i]) >> 4;
#pragma unroll
          for (int way = 0; way < kWays; ++way) {
            acc[1][j][i] -= 8 * exchange.sums[way][j * 8 + lane % 4 * 2 + i % 2];
          }
        }
      }
    }
  }

  // Adds this block's part of a group to the workspace; the last block gets all of it and leaves
  // zeros. All threads call it; `leads`: those that have sums.
  LLMQAT_DEVICE bool combine(const LinearArgs& args, int group, int stages, int32_t* flag, int lane,
                             bool leads) {
    uint32_t* ticket = static_cast<uint32_t*>(args.p.workspace) + group;
    int32_t* values =
        reinterpret_cast<int32_t*>(static_cast<unsigned char*>(args.p.workspace) + kTicketBytes) +
        group * (kTokenTiles * kColumnValues) + threadIdx.x;
    const int first_token = lane % 4 * 2;
    const auto there = [&](int v) { return v / 8 * 8 + first_token + v % 2 < args.p.m; };
    if (leads) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (there(v)) reduce_add_s32(values + v * kLinearThreads, value(v));
      }
    }
    if (!is_last_arriver(ticket, static_cast<uint32_t>(stages), static_cast<uint32_t>(args.stages),
                         flag)) {
      return false;
    }
    if (leads) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (!there(v)) continue;
        value(v) = values[v * kLinearThreads];
        values[v * kLinearThreads] = 0;
      }
    }
    return true;
  }
};

// The work of a block in portions, each of one group: its share of the cut groups, then its whole
// groups.
class LinearWalk {
 public:
  int group, stage, count;  // the portion: `count` stages from `stage` on

  LLMQAT_DEVICE explicit LinearWalk(const LinearArgs& args) {
    const int block = static_cast<int>(blockIdx.x), more = args.more_units;
    const int first = args.block_units * block + (block < more ? block : more);
    cut_ = args.block_units + (block < more ? 1 : 0);
    whole_ = args.whole;
    group = first / args.stages;
    stage = first - group * args.stages;
    begin(args);
  }

  // false: this portion was the last.
  LLMQAT_DEVICE bool next(const LinearArgs& args) {
    ++group;
    stage = 0;
    return begin(args);
  }

 private:
  LLMQAT_DEVICE bool begin(const LinearArgs& args) {
    if (cut_ > 0) {
      const int to_end = args.stages - stage;
      count = cut_ < to_end ? cut_ : to_end;
      cut_ -= count;
      return true;
    }
    count = whole_ > 0 ? args.stages : 0;
    group = args.cut + (static_cast<int>(blockIdx.x) + 1) * args.whole - whole_;
    stage = 0;
    return whole_-- > 0;
  }

  int cut_, whole_;  // stages and groups that are left
};

template <bool kNibbles, int kTokenTiles>
LLMQAT_KERNEL_MIN_BLOCKS(kLinearThreads, kTokenTiles <= 4 ? 3 : 2)
integer_linear_kernel(const LinearArgs args) {
  using Group = IntegerGroup<kNibbles, kTokenTiles>;
  using Ring = typename Group::Ring;
  constexpr int kBuffers = Ring::kBuffers;
  griddepcontrol_launch_dependents();
  LLMQAT_DYNAMIC_SHARED(shared);
  auto& exchange = *reinterpret_cast<typename Group::Exchange*>(shared + Ring::kBytes);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  LinearWalk at(args), ahead = at;
  LinearFeed<Ring> feed(args, shared, ahead.group, ahead.stage);
  feed.prefetch_and_wait();
  const auto issue = [&](int buffer) {
    if (ahead.count > 0) {
      feed.issue(buffer);
      if (--ahead.count == 0 && ahead.next(args)) feed.seek(ahead.group, ahead.stage);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kBuffers - 1; ++i) issue(i * Ring::kStageBytes);

  Group sums;
  int buffer = 0, free = (kBuffers - 1) * Ring::kStageBytes;
  do {
    sums.clear();
#pragma unroll 1
    for (int left = at.count; left > 0; --left) {
      cp_async_wait<kBuffers - 2>();
      sync_block();  // this stage is there for all; the one before it is free to be filled
      issue(free);
      sums.consume(shared + buffer, warp, lane);
      free = buffer;
      buffer = buffer == (kBuffers - 1) * Ring::kStageBytes ? 0 : buffer + Ring::kStageBytes;
    }
    const bool leads = Group::kWays == 1 || warp == 0;
    if constexpr (Group::kExchanges) {
      sums.publish(exchange, warp, lane);
      sync_block();
      if (leads) sums.collect(exchange, lane);
    }
    const bool last = at.count == args.stages ||
                      sums.combine(args, at.group, at.count, &exchange.flag, lane, leads);
    if (last && leads) {
      store_tile<true>(args, at.group * Ring::kGroupTiles + warp / Group::kWays, lane, sums.acc);
    }
  } while (at.next(args));
}

// LLMQAT_LINEAR_BLOCKS_PER_SM: for tuning on a device; read at every launch.
int64_t wanted_blocks_per_sm() {
  const char* wanted = std::getenv("LLMQAT_LINEAR_BLOCKS_PER_SM");
  return wanted == nullptr ? 0 : std::atoi(wanted);
}

template <bool kNibbles, int kTokenTiles>
void launch(LinearArgs& args, void* stream) {
  using Group = IntegerGroup<kNibbles, kTokenTiles>;
  constexpr auto kernel = integer_linear_kernel<kNibbles, kTokenTiles>;
  constexpr auto kBytes = static_cast<size_t>(Group::kSharedBytes);
  // Of the first device that runs it: on another it may cost time, never a bit.
  static const int resident = LLMQAT_RESIDENT_BLOCKS(kernel, kLinearThreads, kBytes);
  const int64_t per_sm = linear_blocks_per_sm(kTokenTiles, resident, wanted_blocks_per_sm());
  const LinearPlan plan =
      linear_plan(args.groups, args.stages, Group::Ring::kWeightBytes, args.p.sms, per_sm);
  args.whole = static_cast<int>(plan.whole);
  args.cut = static_cast<int>(plan.cut);
  args.block_units = static_cast<int>(plan.cut * args.stages / plan.blocks);
  args.more_units = static_cast<int>(plan.cut * args.stages % plan.blocks);
  LLMQAT_LAUNCH_SHARED(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kLinearThreads),
                       kBytes, stream, args);
}

template <bool kNibbles>
int run(const LlmqatLinear& problem, void* stream) {
  for (int64_t first = 0; first < problem.m; first += kLinearTokens) {
    const int64_t left = problem.m - first;
    const int64_t rows = left < kLinearTokens ? left : kLinearTokens;
    const int token_tiles = linear_token_tiles(rows);
    LinearArgs args;
    if (!linear_args(linear_rows(problem, first, rows, 1), 1, linear_ways(token_tiles), args)) {
      return cudaErrorInvalidValue;
    }
    switch (token_tiles) {
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
      problem->sms * llmqat::kLinearMostBlocksPerSm * 4 > llmqat::kTicketBytes) {
    return cudaErrorInvalidValue;
  }
  return problem->nibbles ? llmqat::run<true>(*problem, stream)
                          : llmqat::run<false>(*problem, stream);
}
