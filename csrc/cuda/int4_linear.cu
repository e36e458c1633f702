// integer_group_matmul: 4-bit weights in groups with integer multipliers, W4A4 and W4A8.
//
// Math:     spec 18: y = sum_g m[n,g] * sum_k a w, one int32 sum, then scales, bias, one cast.
// Shapes:   a[m, k], w[n, k], multiplier[n, k / group_size], scales [m] and [n], y[m, n].
// Dtypes:   weights 4-bit codes; activations 4-bit codes (spec 8 bytes) or int8; y float.
// Tiling:   weights are the MMA's 16-row side, tokens its 8-column side. A block of 4 warps takes
//           64 channels x 8 tokens (m <= 8: memory-bound, many blocks) or 128 x 64 (a warp's 32 x
//           64 uses each fragment 2 or 8 times and fits 64 sums in registers). A stage is 256 k:
//           rows of 128 bytes, one line of DRAM; cp.async keeps 3 or 2 stages under way. k is split
//           over blocks until there are two a multiprocessor; the last of a tile adds the parts up.
// Cost:     floor: n * k / 2 bytes of weights; or 2 m n k operations at the rate of int4 (sm_80) or
//           int8 MMA. The multiplier costs 4 IMAD for each MMA tile and 128 k: half the MMA's time
//           on sm_80, where float scales would cost 4 I2F + 4 FFMA, more than the MMAs.
// Numerics: exact: integers to the last step. No cut of m or k, and no batch, changes a bit.
// Edges:    rows, channels and k beyond the end are zero codes; m = 0 or n = 0 launches nothing.
// Limits:   k <= 38,342. Tiles need packed weights and groups of whole 64; the rest (odd groups,
//           int8 weight storage, misaligned pointers) takes a plain kernel, a warp a result. sm_90
//           has no int4 MMA: codes become int8 in registers (int4_fragments.cuh).
// Tests:    tests/emulator/test_int4_linear.py, tests/kernels/test_integer_groups.py.
// Bench:    python -m benchmarks.run --op integer_group_matmul --device cuda
#include <climits>

#include "cuda/int4_fragments.cuh"
#include "cuda/int4_linear.h"
#include "llmqat/heuristics_int4.h"
#include "llmqat/int4.h"
#include "llmqat/quant_math.h"

namespace llmqat {
namespace {

constexpr int kWarpLanes = 32, kWarps = 4, kThreads = kWarps * kWarpLanes;
constexpr int kPackedRow = kInt4StageK / 2;  // bytes of a row of a stage
constexpr int kWholeSegment = 128;           // k between two multipliers, if groups allow it

using Problem = LlmqatInt4Linear;

LLMQAT_DEVICE float bias_value(const Problem& p, int64_t channel) {
  if (p.bias_dtype == LLMQAT_FLOAT32) return static_cast<const float*>(p.bias)[channel];
  return p.bias_dtype == LLMQAT_BFLOAT16 ? to_float(static_cast<const bf16*>(p.bias)[channel])
                                         : to_float(static_cast<const fp16*>(p.bias)[channel]);
}

LLMQAT_DEVICE void store_result(const Problem& p, int64_t token, int64_t channel, int32_t sum) {
  float v = mul_rn(static_cast<float>(sum), mul_rn(p.a_scale[token], p.w_scale[channel]));
  if (p.bias != nullptr) v = add_rn(v, bias_value(p, channel));
  const int64_t at = token * p.n + channel;
  if (p.dtype == LLMQAT_FLOAT32) {
    static_cast<float*>(p.y)[at] = v;
  } else if (p.dtype == LLMQAT_BFLOAT16) {
    static_cast<bf16*>(p.y)[at] = to_bf16(v);
  } else {
    static_cast<fp16*>(p.y)[at] = to_fp16(v);
  }
}

// Sizes and shared memory of one form of the tiled kernel.
template <int kTokens, bool kInt8Tokens, int kSegment_>
struct Tile {
  using Math = Int4Math<kInt8Tokens>;
  static constexpr int kSegment = kSegment_;  // k that share a multiplier: 64 or 128
  static constexpr int kChannels = int4_channel_tile(kTokens);
  static constexpr int kRowTiles = kChannels / kWarps / 16;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kSteps = kSegment / kInt4StepK;
  static constexpr int kSegments = kInt4StageK / kSegment;  // of a stage
  static constexpr int kStages = kTokens == 8 ? 4 : 3;
  static constexpr int kMinBlocks = kTokens == 8 ? 4 : 2;
  static constexpr int kWeightBytes = kChannels * kPackedRow;
  static constexpr int kTokenRow = kInt8Tokens ? kInt4StageK : kPackedRow;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kTokenRow;
  // Sums in shared memory: 4 words more than the channels, so that the 4 token pairs and 8 channels
  // that a warp writes at once lie in different banks.
  static constexpr int kSumStride = kChannels + 4;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageBytes, "sums take the stages' place");

  // Bytes from one channel's multipliers to the next: an odd number of words, against conflicts.
  LLMQAT_HD static int multiplier_stride(int segments) { return (segments + 3) / 4 / 2 * 8 + 4; }
  static size_t shared_bytes(int64_t stages) {
    const int stride = multiplier_stride(static_cast<int>(stages) * kSegments);
    return 16 + static_cast<size_t>(kStages) * kStageBytes +
           static_cast<size_t>(kChannels) * stride;
  }
};

// What a block works on.
struct Work {
  int64_t channel, token;  // the first of the tile
  int64_t stage, stages;   // the first stage of its part of k, and how many
};

// Starts copying kRows rows of one stage, kRowBytes of each; what lies beyond the end becomes
// zeros.
template <int kRows, int kRowBytes>
LLMQAT_DEVICE void copy_rows(const void* base, int64_t row_bytes, int64_t row, int64_t rows,
                             int64_t stage, unsigned char* to) {
  constexpr int kPieces = kRowBytes / kPieceBytes, kPass = kThreads / kPieces;
  static_assert(kPass % 8 == 0, "places of later passes differ by whole rows");
  const int mine = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  if (mine >= kRows) return;
  const int64_t column = stage * kRowBytes + piece * kPieceBytes;
  const auto* from = static_cast<const unsigned char*>(base) + (row + mine) * row_bytes + column;
  const int64_t there = column < row_bytes ? rows - row - mine : 0;  // rows that are not beyond
  to += kPieces == 8 ? packed_place(mine, piece) : int8_place(mine, piece);
#pragma unroll
  for (int i = 0; i < kRows; i += kPass) {
    cp_async_16(to + i * kRowBytes, from, i < there);  // beyond the end nothing is read
    from += kPass * row_bytes;
  }
}

template <class T>
LLMQAT_DEVICE void copy_stage(const Problem& p, const Work& work, int64_t stage,
                              unsigned char* to) {
  copy_rows<T::kChannels, kPackedRow>(p.w, p.k / 2, work.channel, p.n, stage, to);
  copy_rows<T::kTokenTiles * 8, T::kTokenRow>(p.a, p.k * T::kTokenRow / kInt4StageK, work.token,
                                              p.m, stage, to + T::kWeightBytes);
}

// The multiplier of every segment of the block's part of k; 0 beyond the end.
template <class T>
LLMQAT_DEVICE void copy_multipliers(const Problem& p, const Work& work, uint8_t* to, int stride) {
  const int64_t groups = p.k / p.group_size;
  const int segments = static_cast<int>(work.stages) * T::kSegments;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  for (int row = warp; row < T::kChannels; row += kWarps) {
    for (int s = static_cast<int>(threadIdx.x) % kWarpLanes; s < segments; s += kWarpLanes) {
      const int k = static_cast<int>(work.stage) * kInt4StageK + s * T::kSegment;
      const bool valid = work.channel + row < p.n && k < p.k;
      to[row * stride + s] =
          valid ? p.multiplier[(work.channel + row) * groups + k / static_cast<int>(p.group_size)]
                : uint8_t{0};
    }
  }
}

// Adds one segment of a stage to the sums of a warp. factor[i]: channels g and g + 8 of row tile i.
template <class T, bool kInt8Tokens>
LLMQAT_DEVICE void add_segment(int32_t (&sum)[T::kRowTiles][T::kTokenTiles][4],
                               const int32_t (&factor)[T::kRowTiles][2],
                               const unsigned char* weights, const unsigned char* tokens, int row,
                               int first_step, int lane) {
  using Math = typename T::Math;
  typename Math::Weights w[T::kRowTiles][T::kSteps];
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int s = 0; s < T::kSteps; ++s) {
      load_weights<Math>(w[i][s], weights, row + i * 16, first_step + s, lane);
    }
  }
  constexpr int kAtOnce = T::kTokenTiles % 2 == 0 ? 2 : 1;  // column tiles that one ldmatrix fills
#pragma unroll
  for (int j = 0; j < T::kTokenTiles; j += kAtOnce) {
    typename Math::Tokens a[kAtOnce][T::kSteps];
#pragma unroll
    for (int s = 0; s < T::kSteps; ++s) {
      if constexpr (kInt8Tokens) {
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          load_int8_tokens<Math>(a[t][s], tokens, (j + t) * 8, first_step + s, lane);
        }
      } else if constexpr (kAtOnce == 2) {
        load_packed_tokens<Math>(a[0][s], a[1][s], tokens, j * 8, first_step + s, lane);
      } else {
        load_packed_tokens<Math>(a[0][s], tokens, j * 8, first_step + s, lane);
      }
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
        int32_t part[4] = {0, 0, 0, 0};
#pragma unroll
        for (int s = 0; s < T::kSteps; ++s) Math::multiply(part, w[i][s], a[t][s]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[i][j + t][c] += (part[c] >> Math::kShift) * factor[i][c / 2];
        }
      }
    }
  }
}

// All stages of a block into the sums of its warps.
template <class T, bool kInt8Tokens>
LLMQAT_DEVICE void add_stages(const Problem& p, const Work& work, unsigned char* stages,
                              const uint8_t* multipliers, int stride,
                              int32_t (&sum)[T::kRowTiles][T::kTokenTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int row = static_cast<int>(threadIdx.x) / kWarpLanes * (T::kRowTiles * 16);
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < work.stages) {
      copy_stage<T>(p, work, work.stage + s, stages + s * T::kStageBytes);
    }
    cp_async_commit();
  }
  int read = 0, write = T::kStages - 1;  // places in the ring
  for (int64_t s = 0; s < work.stages; ++s) {
    cp_async_wait<T::kStages - 2>();
    sync_block();  // stage s is there for all, and nobody reads what is overwritten next
    if (s + T::kStages - 1 < work.stages) {
      copy_stage<T>(p, work, work.stage + s + T::kStages - 1, stages + write * T::kStageBytes);
    }
    cp_async_commit();
    const unsigned char* here = stages + read * T::kStageBytes;
#pragma unroll(T::kTokenTiles == 1 ? T::kSegments : 1)
    for (int g = 0; g < T::kSegments; ++g) {
      int32_t factor[T::kRowTiles][2];
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = row + i * 16 + half * 8 + lane / 4;
          factor[i][half] = multipliers[channel * stride + static_cast<int>(s) * T::kSegments + g];
        }
      }
      add_segment<T, kInt8Tokens>(sum, factor, here, here + T::kWeightBytes, row, g * T::kSteps,
                                  lane);
    }
    read = read + 1 == T::kStages ? 0 : read + 1;
    write = write + 1 == T::kStages ? 0 : write + 1;
  }
  cp_async_wait<0>();
  sync_block();  // the stages are free
}

// Hands the block's sums over; true in the block that comes last, when all of its tile are there.
template <class T>
LLMQAT_DEVICE bool is_last_part(const Problem& p, int32_t* flag, const int32_t* sums,
                                int32_t* part) {
  for (int e = static_cast<int>(threadIdx.x); e < T::kTokenTiles * 8 * T::kChannels;
       e += kThreads) {
    part[e] = sums[e / T::kChannels * T::kSumStride + e % T::kChannels];
  }
  thread_fence();
  sync_block();
  if (threadIdx.x == 0) {
    const uint32_t before = atomic_add_u32(p.tickets + blockIdx.x, 1);
    *flag = before + 1 == static_cast<uint32_t>(p.splits);
    thread_fence();
  }
  sync_block();
  return *flag != 0;
}

template <int kTokens, bool kInt8Tokens, int kSegment>
LLMQAT_KERNEL_MIN_BLOCKS(kThreads, (Tile<kTokens, kInt8Tokens, kSegment>::kMinBlocks))
int4_linear_kernel(Problem p) {
  using T = Tile<kTokens, kInt8Tokens, kSegment>;
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  int32_t* const flag = reinterpret_cast<int32_t*>(shared);
  unsigned char* const stages = shared + 16;
  uint8_t* const multipliers = stages + T::kStages * T::kStageBytes;

  const int64_t token_tiles = (p.m + kTokens - 1) / kTokens, all = int4_stages(p.k);
  const int64_t first = all * blockIdx.y / p.splits, end = all * (blockIdx.y + 1) / p.splits;
  const Work work{blockIdx.x / token_tiles * T::kChannels, blockIdx.x % token_tiles * kTokens,
                  first, end - first};
  const int stride = T::multiplier_stride(static_cast<int>(work.stages) * T::kSegments);
  copy_multipliers<T>(p, work, multipliers, stride);

  int32_t sum[T::kRowTiles][T::kTokenTiles][4] = {};
  add_stages<T, kInt8Tokens>(p, work, stages, multipliers, stride, sum);

  int32_t* const sums = reinterpret_cast<int32_t*>(stages);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int row = static_cast<int>(threadIdx.x) / kWarpLanes * (T::kRowTiles * 16);
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < T::kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int channel = row + i * 16 + c / 2 * 8 + lane / 4;
        const int token = j * 8 + lane % 4 * 2 + c % 2;
        sums[token * T::kSumStride + channel] = sum[i][j][c];
      }
    }
  }
  sync_block();

  constexpr int kElements = kTokens * T::kChannels;
  int32_t* const parts = p.workspace + static_cast<int64_t>(blockIdx.x) * p.splits * kElements;
  if (p.splits > 1) {
    int32_t* const mine = parts + static_cast<int64_t>(blockIdx.y) * kElements;
    if (!is_last_part<T>(p, flag, sums, mine)) return;
  }
  for (int e = static_cast<int>(threadIdx.x); e < kElements; e += kThreads) {
    const int64_t token = work.token + e / T::kChannels, channel = work.channel + e % T::kChannels;
    if (token >= p.m || channel >= p.n) continue;
    int32_t total = 0;
    if (p.splits == 1) {
      total = sums[e / T::kChannels * T::kSumStride + e % T::kChannels];
    } else {
      for (int part = 0; part < p.splits; ++part) {
        total += parts[static_cast<int64_t>(part) * kElements + e];
      }
    }
    store_result(p, token, channel, total);
  }
}

LLMQAT_DEVICE int32_t code_at(const void* codes, bool packed, int64_t row, int64_t columns,
                              int64_t column) {
  if (!packed) return static_cast<const int8_t*>(codes)[row * columns + column];
  const uint8_t byte = static_cast<const uint8_t*>(codes)[row * packed_size(columns) + column / 2];
  return column % 2 == 0 ? unpack_even(byte) : unpack_odd(byte);
}

// Any layout: a warp for every result.
LLMQAT_KERNEL(kThreads) int4_linear_any_kernel(Problem p) {
  take_turn();
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
  if (warp >= p.m * p.n) return;
  const int64_t token = warp / p.n, channel = warp % p.n;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, k = static_cast<int>(p.k);
  const int group_size = static_cast<int>(p.group_size);
  const uint8_t* multiplier = p.multiplier + channel * (p.k / p.group_size);
  int32_t sum = 0;
  for (int column = lane; column < k; column += kWarpLanes) {
    const int32_t product = code_at(p.a, p.a_packed, token, p.k, column) *
                            code_at(p.w, p.w_packed, channel, p.k, column);
    sum += product * multiplier[column / group_size];
  }
  sum = redux_add_s32(sum);
  if (lane == 0) store_result(p, token, channel, sum);
}

template <int kTokens, bool kInt8Tokens, int kSegment>
int launch_tiled(const Problem& p, void* stream) {
  using T = Tile<kTokens, kInt8Tokens, kSegment>;
  const int64_t stages = int4_stages(p.k),
                tiles = ((p.n + T::kChannels - 1) / T::kChannels) * ((p.m + kTokens - 1) / kTokens);
  const int64_t longest = (stages + p.splits - 1) / p.splits;
  const bool fits = tiles <= INT_MAX && p.splits >= 1 && p.splits <= stages && p.splits <= 65535 &&
                    longest <= kInt4MaxStages;
  if (!fits) return cudaErrorInvalidValue;
  LLMQAT_LAUNCH_SHARED((int4_linear_kernel<kTokens, kInt8Tokens, kSegment>),
                       dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits)),
                       dim3(kThreads), T::shared_bytes(longest), stream, p);
  return cudaGetLastError();
}

template <int kTokens>
int launch_tokens(const Problem& p, void* stream) {
  const bool whole = p.group_size % kWholeSegment == 0;
  if (p.a_packed) {
    return whole ? launch_tiled<kTokens, false, kWholeSegment>(p, stream)
                 : launch_tiled<kTokens, false, kInt4StepK>(p, stream);
  }
  return whole ? launch_tiled<kTokens, true, kWholeSegment>(p, stream)
               : launch_tiled<kTokens, true, kInt4StepK>(p, stream);
}

}  // namespace
}  // namespace llmqat

extern "C" bool llmqat_cuda_int4_is_regular(const LlmqatInt4Linear* p) {
  const auto aligned = [](const void* at) {
    return reinterpret_cast<uintptr_t>(at) % llmqat::kPieceBytes == 0;
  };
  return p->w_packed && p->group_size % llmqat::kInt4StepK == 0 && aligned(p->w) && aligned(p->a);
}

extern "C" int llmqat_cuda_int4_linear(const LlmqatInt4Linear* p, void* stream) {
  if (p->m == 0 || p->n == 0) return cudaSuccess;
  switch (p->token_tile) {
    case 8: return llmqat::launch_tokens<8>(*p, stream);
    case 64: return llmqat::launch_tokens<64>(*p, stream);
    default: break;
  }
  const int64_t blocks = (p->m * p->n + llmqat::kWarps - 1) / llmqat::kWarps;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  LLMQAT_LAUNCH(llmqat::int4_linear_any_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(llmqat::kThreads), stream, *p);
  return cudaGetLastError();
}
