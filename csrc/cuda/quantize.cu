// quantize: rows of floats to int8 codes and one fp32 scale a row.
//
// Math:     spec 1-4.
// Shapes:   x[rows, columns] of dense rows, codes[rows, columns], scale[rows]; a group is a row.
// Dtypes:   fp32, bf16, fp16 in; int8 and fp32 out.
// Tiling:   a row of up to 32 loads belongs to one warp, four rows to a block of 128 threads (16 of
//           them fill an SM's 64 warp slots); a longer one to a block of up to 256 threads
//           (heuristics.h). Loads are 16 bytes where base, columns and stride allow, else a value.
//           kHeld = 4 vectors a thread stay in registers: 256 threads hold 8192 bf16, every hidden
//           size of LLaMA 7B to 65B; wider rows are read again, from L2.
// Cost:     memory-bound. Floor: rows * (columns * (sizeof(T) + 1) + 4) bytes; [2048, 4096] bf16 is
//           25 MB: 16 us at 1.55 TB/s (A100), 7.5 us at 3.35 TB/s (H100).
// Numerics: exact: integer maximum of |x|'s bits, then div.rn, mul.rn, clamp, add of the magic.
// Edges:    rows = 0 launches nothing; columns = 0 gives scale 1; NaN, Inf, zero: see row_scale.
// Limits:   sm_80 or newer (redux.sync); rows <= 2^31 - 1 blocks.
// Tests:    tests/kernels/test_native.py, tests/emulator/test_quantize.py.
// Bench:    python -m benchmarks.run --op quantize
#include <climits>

#include "cuda/launchers.h"
#include "llmqat/heuristics.h"
#include "llmqat/quant_math.h"
#include "llmqat/reduce.cuh"
#include "llmqat/vec.cuh"

namespace llmqat {
namespace {

constexpr int kMaxThreads = 256;  // heuristics.h: at most 8 warps a row
constexpr int kRowsPerBlock = 4;  // when a warp owns a row
constexpr int kHeld = 4;          // vectors a thread keeps between the two passes
constexpr int kVectorBytes = 16;  // the widest load

template <class T, int kN>
LLMQAT_DEVICE uint32_t vec_magnitude(const Vec<T, kN>& x) {
  uint32_t m = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t u = magnitude_bits(to_float(x.v[i]));
    m = u > m ? u : m;
  }
  return m;
}

template <class T, int kN>
LLMQAT_DEVICE Vec<int8_t, kN> vec_codes(const Vec<T, kN>& x, const RowScale& row, float limit) {
  Vec<int8_t, kN> codes;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    codes.v[i] = row.zero ? int8_t{0} : quantize_code(to_float(x.v[i]), row.inv, limit);
  }
  return codes;
}

template <class T, int kN>
LLMQAT_KERNEL(kMaxThreads)
quantize_kernel(const T* __restrict__ x, int64_t rows, int64_t columns, int64_t row_stride,
                int bits, bool bf16_scale, int8_t* __restrict__ codes, float* __restrict__ scale) {
  take_turn();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (r >= rows) return;  // whole warps only: blockDim.y > 1 means one warp a row
  const int64_t chunks = columns / kN, stride = blockDim.x;
  x += r * row_stride;
  codes += r * columns;

  Vec<T, kN> held[kHeld];
  uint32_t amax = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t c = threadIdx.x + h * stride;
    if (c < chunks) {
      held[h] = load_vec<T, kN>(x + c * kN);
      const uint32_t m = vec_magnitude(held[h]);
      amax = m > amax ? m : amax;
    }
  }
  for (int64_t c = threadIdx.x + kHeld * stride; c < chunks; c += stride) {
    const uint32_t m = vec_magnitude(load_vec<T, kN>(x + c * kN));
    amax = m > amax ? m : amax;
  }

  const RowScale row = row_scale(row_max_u32(amax), bits, bf16_scale);
  const float limit = static_cast<float>(qmax(bits));
  if (threadIdx.x == 0) scale[r] = row.scale;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t c = threadIdx.x + h * stride;
    if (c < chunks) store_vec(codes + c * kN, vec_codes(held[h], row, limit));
  }
  for (int64_t c = threadIdx.x + kHeld * stride; c < chunks; c += stride) {
    store_vec(codes + c * kN, vec_codes(load_vec<T, kN>(x + c * kN), row, limit));
  }
}

template <class T, int kN>
int launch_vector(const T* x, int64_t rows, int64_t columns, int64_t row_stride, int bits,
                  bool bf16_scale, int8_t* codes, float* scale, void* stream) {
  const unsigned threads = static_cast<unsigned>(quantize_threads(columns, kN));
  const unsigned per_block = threads == kWarp ? kRowsPerBlock : 1;
  const int64_t blocks = (rows + per_block - 1) / per_block;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  LLMQAT_LAUNCH((quantize_kernel<T, kN>), dim3(static_cast<unsigned>(blocks)),
                dim3(threads, per_block), stream, x, rows, columns, row_stride, bits, bf16_scale,
                codes, scale);
  return cudaGetLastError();
}

template <class T>
int launch(const void* x, int64_t rows, int64_t columns, int64_t row_stride, int bits,
           bool bf16_scale, int8_t* codes, float* scale, void* stream) {
  constexpr int kN = kVectorBytes / sizeof(T);
  const auto x_address = reinterpret_cast<uintptr_t>(x);
  const auto codes_address = reinterpret_cast<uintptr_t>(codes);
  const bool aligned = x_address % kVectorBytes == 0 && codes_address % kN == 0 &&
                       columns % kN == 0 && row_stride % kN == 0;
  const auto run = aligned ? &launch_vector<T, kN> : &launch_vector<T, 1>;
  return run(static_cast<const T*>(x), rows, columns, row_stride, bits, bf16_scale, codes, scale,
             stream);
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_quantize(const void* x, int dtype, int64_t rows, int64_t columns,
                                    int64_t row_stride, int bits, bool bf16_scale, int8_t* codes,
                                    float* scale, void* stream) {
  using namespace llmqat;
  if (rows == 0) return cudaSuccess;
  const auto run = dtype == LLMQAT_FLOAT32    ? &launch<float>
                   : dtype == LLMQAT_BFLOAT16 ? &launch<bf16>
                   : dtype == LLMQAT_FLOAT16  ? &launch<fp16>
                                              : nullptr;
  if (run == nullptr) return cudaErrorInvalidValue;
  return run(x, rows, columns, row_stride, bits, bf16_scale, codes, scale, stream);
}
