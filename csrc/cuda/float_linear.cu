// float_linear: fp16 or bf16 activations times 4-bit weights in fragment order, for few tokens.
//
// Math:     spec 7 with activations off: y = (sum_k x[k] * code[k]) * sw[n] + bias; 14 with
//           silu_mul. A 4-bit code becomes a 16-bit float in two instructions: its bits (plus 8)
//           in the low mantissa of a constant (1024 in fp16, 128 in bf16), then the constant and 8
//           are subtracted, exactly.
// Shapes:   x[m, k], w: fragment_layout.h (the layout of integer_linear), y[m, n] (or [m, n / 2]).
// Dtypes:   fp16 or bf16 x and y, fp32 sums and scales.
// Tiling:   as integer_linear beyond 8 tokens, m16n8k16: 4 warps of 32 channels, 128 k a stage, 3
// to
//           5 stages of cp.async (linear_pipeline.cuh). One block a group and split.
// Cost:     memory-bound for m <= 32: n * k / 2 bytes.
// Numerics: 2x rule. The weight is not rounded to x's dtype: its scale multiplies the fp32 sum.
//           Stages are cut by n, k and the device alone and added in order: a row's result depends
//           neither on the other rows nor on the run.
// Edges:    k tail: activations 0; n tail: channels dropped. NaN and Inf go through the products.
// Limits:   sm_80 or newer; one launch at a time on a workspace.
// Tests:    tests/emulator/test_float_linear.py
// Bench:    python -m benchmarks.run --op quantized_linear --device cuda
#include "cuda/linear_epilogue.cuh"

namespace llmqat {
namespace {

constexpr int kAndOr = 0xEA, kAndXor = 0x6A;  // (a & b) | c, (a & b) ^ c as truth tables

// How 4-bit codes become T, two at a time.
template <class T>
struct Codes;

template <>
struct Codes<fp16> {
  static constexpr uint32_t kBase = 0x64006400u;  // 1024: the last mantissa bit is 1
  LLMQAT_DEVICE static uint32_t without_base(uint32_t v) {
    return half2_fma(v, 0x3C003C00u, 0xE408E408u);  // v * 1 - 1032
  }
  LLMQAT_DEVICE static void multiply(float (&acc)[4], const uint32_t (&w)[4],
                                     const uint32_t (&x)[2]) {
    mma_m16n8k16_f16(acc, w, x);
  }
};

template <>
struct Codes<bf16> {
  static constexpr uint32_t kBase = 0x43004300u;  // 128
  LLMQAT_DEVICE static uint32_t without_base(uint32_t v) {
    return bf162_fma(v, 0x3F803F80u, 0xC308C308u);  // v * 1 - 136
  }
  LLMQAT_DEVICE static void multiply(float (&acc)[4], const uint32_t (&w)[4],
                                     const uint32_t (&x)[2]) {
    mma_m16n8k16_bf16(acc, w, x);
  }
};

// Codes of four bytes (of one channel of each half) as pairs of T: pair[part][i] are k 2i, 2i + 1.
template <class T>
LLMQAT_DEVICE void convert(uint32_t bytes, uint32_t (&pair)[2][2]) {
  constexpr uint32_t kLow = 0x000F000Fu, kBase = Codes<T>::kBase;
  constexpr uint32_t kSign = 0x00080008u;  // two's complement to code + 8
  const uint32_t w =
      byte_permute(bytes, 0, 0x3120);  // k 0, 2, 1, 3: two bytes apart are neighbours
  pair[0][0] = Codes<T>::without_base(lop3<kAndXor>(w >> 4, kLow, kBase | kSign));
  pair[1][0] = Codes<T>::without_base(lop3<kAndOr>(w, kLow, kBase));
  pair[0][1] = Codes<T>::without_base(lop3<kAndXor>(w >> 12, kLow, kBase | kSign));
  pair[1][1] = Codes<T>::without_base(lop3<kAndOr>(w >> 8, kLow, kBase));
}

template <class T, int kTokenTiles>
struct FloatGroup {
  // Lanes read every second chunk of a row at a time: rows of odd number begin with the others.
  using Ring = LinearRing<true, kTokenTiles, 2, 1, 1>;
  static constexpr int kSharedBytes = Ring::kBytes + 16;

  float acc[2][kTokenTiles][4];

  LLMQAT_DEVICE void consume(const unsigned char* buffer, int warp, int lane) {
    const unsigned char* weights = Ring::weights(buffer, warp, lane);
#pragma unroll
    for (int slot = 0; slot < Ring::kLoads; ++slot) {
      const int chunk = slot / 2 * 8 + lane % 4 * 2 + slot % 2;
      const unsigned char* rows = Ring::activations(buffer, warp, lane, chunk);
      Word4 x[kTokenTiles];  // eight neighbours in k
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) x[j] = load_16(rows + j * 8 * Ring::kRowBytes);
      const Word4 packed = load_16(weights + slot * kFragmentBytes);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t even[2][2], odd[2][2];  // rows group and group + 8 of the MMA
        convert<T>(packed.v[2 * step], even);
        convert<T>(packed.v[2 * step + 1], odd);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const uint32_t w[4] = {even[part][0], odd[part][0], even[part][1], odd[part][1]};
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const uint32_t columns[2] = {x[j].v[2 * step], x[j].v[2 * step + 1]};
            Codes<T>::multiply(acc[part][j], w, columns);
          }
        }
      }
    }
  }

  // Every split stores its sums; the last one to come adds them all in order and leaves zeros.
  LLMQAT_DEVICE bool combine(const LinearArgs& args, int group, int split, int32_t* flag,
                             int lane) {
    constexpr int kValues = kTokenTiles * 8;
    constexpr int kSlot = kTokenTiles * static_cast<int>(kColumnValues);
    float* values =
        reinterpret_cast<float*>(static_cast<unsigned char*>(args.p.workspace) + kTicketBytes) +
        static_cast<int64_t>(group) * args.splits * kSlot + threadIdx.x;
    uint32_t* ticket = static_cast<uint32_t*>(args.p.workspace) + group;
    const int first_token = lane % 4 * 2;
    const auto there = [&](int v) { return v / 8 * 8 + first_token + v % 2 < args.p.m; };
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (!there(v)) continue;
      values[split * kSlot + v * kLinearThreads] = acc[v / 4 % 2][v / 8][v % 4];
    }
    if (!is_last_arriver(ticket, 1, static_cast<uint32_t>(args.splits), flag)) return false;
#pragma unroll
    for (int v = 0; v < kValues; ++v) acc[v / 4 % 2][v / 8][v % 4] = 0.0f;
#pragma unroll 1
    for (int s = 0; s < args.splits; ++s) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (!there(v)) continue;
        float* part = values + s * kSlot + v * kLinearThreads;
        acc[v / 4 % 2][v / 8][v % 4] = add_rn(acc[v / 4 % 2][v / 8][v % 4], *part);
        *part = 0.0f;
      }
    }
    return true;
  }
};

// The stage that a split begins with. Stages are cut two by two.
LLMQAT_DEVICE int first_stage(const LinearArgs& args, int split) {
  const int first = 2 * linear_float_cut((args.stages + 1) / 2, args.splits, split);
  return first < args.stages ? first : args.stages;
}

template <class T, int kTokenTiles>
LLMQAT_KERNEL_MIN_BLOCKS(kLinearThreads, kLinearFloatBlocksPerSm)
float_linear_kernel(const LinearArgs args) {
  using Group = FloatGroup<T, kTokenTiles>;
  using Ring = typename Group::Ring;
  constexpr int kBuffers = Ring::kBuffers;
  griddepcontrol_launch_dependents();
  LLMQAT_DYNAMIC_SHARED(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(blockIdx.x) / args.splits;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  const int begin = first_stage(args, split);
  int left = first_stage(args, split + 1) - begin, to_issue = left;

  LinearFeed<Ring> feed(args, shared, group, begin);
  feed.prefetch_and_wait();
  const auto issue = [&](int buffer) {
    if (to_issue-- > 0) feed.issue(buffer);
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kBuffers - 1; ++i) issue(i * Ring::kStageBytes);

  Group sums;
#pragma unroll
  for (int v = 0; v < kTokenTiles * 8; ++v) sums.acc[v / 4 % 2][v / 8][v % 4] = 0.0f;
  int buffer = 0, free = (kBuffers - 1) * Ring::kStageBytes;
#pragma unroll 1
  for (; left > 0; --left) {
    cp_async_wait<kBuffers - 2>();
    sync_block();  // this stage is there for all; the one before it is free to be filled
    issue(free);
    sums.consume(shared + buffer, warp, lane);
    free = buffer;
    buffer = buffer == (kBuffers - 1) * Ring::kStageBytes ? 0 : buffer + Ring::kStageBytes;
  }
  auto* flag = reinterpret_cast<int32_t*>(shared + Ring::kBytes);
  if (args.splits == 1 || sums.combine(args, group, split, flag, lane)) {
    store_tile<false>(args, group * kLinearTiles + warp, lane, sums.acc);
  }
}

template <class T, int kTokenTiles>
void launch(const LinearArgs& args, void* stream) {
  LLMQAT_LAUNCH_SHARED((float_linear_kernel<T, kTokenTiles>),
                       dim3(static_cast<unsigned>(args.groups) * args.splits), dim3(kLinearThreads),
                       static_cast<size_t>(FloatGroup<T, kTokenTiles>::kSharedBytes), stream, args);
}

template <class T>
int run(const LlmqatLinear& problem, void* stream) {
  for (int64_t first = 0; first < problem.m; first += kLinearTokens) {
    const int64_t left = problem.m - first;
    const int64_t rows = left < kLinearTokens ? left : kLinearTokens;
    LinearArgs args;
    if (!linear_args(linear_rows(problem, first, rows, 2), 2, 1, args)) {
      return cudaErrorInvalidValue;
    }
    const int pairs = (args.stages + 1) / 2;
    args.splits = static_cast<int>(linear_float_splits(args.groups, pairs, problem.sms));
    switch (linear_token_tiles(rows)) {
      case 1: launch<T, 1>(args, stream); break;
      case 2: launch<T, 2>(args, stream); break;
      case 4: launch<T, 4>(args, stream); break;
      default: launch<T, 8>(args, stream); break;
    }
    if (const int error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_float_linear(const LlmqatLinear* problem, void* stream) {
  if (problem->m == 0 || problem->n == 0) return cudaSuccess;
  if (!problem->nibbles) return cudaErrorInvalidValue;
  switch (problem->dtype) {
    case LLMQAT_BFLOAT16: return llmqat::run<llmqat::bf16>(*problem, stream);
    case LLMQAT_FLOAT16: return llmqat::run<llmqat::fp16>(*problem, stream);
    default: return cudaErrorInvalidValue;
  }
}
