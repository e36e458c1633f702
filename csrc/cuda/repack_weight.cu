// repack_weight: row-major weight codes to the fragment order of the CUDA linears.
//
// Math:     none: a permutation (spec 8, 25), by the index functions of fragment_layout.h.
// Shapes:   w[n, k] int8, or [n, ceil(k / 2)] packed pairs; out: layout_bytes(n, k) and the tag.
// Dtypes:   int8 or uint8 in, uint8 out.
// Tiling:   a thread writes 16 bytes of the layout, one lane's load; 256 threads a block.
// Cost:     n * k codes in, as many out, with scattered reads: once, when a model is loaded.
// Numerics: exact.
// Edges:    beyond n and k: code 0. A code that does not fit 4 bits raises the flag.
// Limits:   any GPU.
// Tests:    tests/emulator/test_quantized_linear.py, tests/kernels/test_fragment_layout.py
// Bench:    none: not on the path of a token.
#include <climits>

#include "cuda/quantized_linear.h"
#include "llmqat/arch.cuh"
#include "llmqat/fragment_layout.h"
#include "llmqat/int4.h"

namespace llmqat {
namespace {

constexpr int kThreads = 256;

struct RowMajor {
  const uint8_t* w;
  int64_t n, k;
  bool packed;

  LLMQAT_DEVICE int code(CodePlace at) const {
    if (at.channel >= n || at.column >= k) return 0;
    if (!packed) return static_cast<int8_t>(w[at.channel * k + at.column]);
    const uint8_t byte = w[at.channel * packed_size(k) + at.column / 2];
    return at.column % 2 == 0 ? unpack_even(byte) : unpack_odd(byte);
  }
};

LLMQAT_KERNEL(kThreads)
repack_weight_kernel(RowMajor from, bool nibbles, int64_t bytes, uint8_t* __restrict__ out,
                     int32_t* misfit) {
  take_turn();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLoadBytes;
  if (first > bytes) return;
  if (first == bytes) {
    store_16(out + first, Word4{{kTag0, kTag1, kTag2, kTag3}});
    return;
  }
  Word4 word{{0, 0, 0, 0}};
  bool fits = true;
#pragma unroll 1
  for (int w = 0; w < 4; ++w) {
    uint32_t value = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int64_t byte = first + w * 4 + i;
      uint32_t v;
      if (nibbles) {
        const int high = from.code(code_place(true, from.n, from.k, byte, 1));
        const int low = from.code(code_place(true, from.n, from.k, byte, 0));
        fits = fits && high >= -8 && high <= 7 && low >= -8 && low <= 7;
        v = static_cast<uint32_t>((high & 15) << 4 | ((low + 8) & 15));
      } else {
        v = static_cast<uint32_t>(from.code(code_place(false, from.n, from.k, byte, -1)) & 255);
      }
      value |= v << (8 * i);
    }
    // Constant indices keep the word in registers.
#pragma unroll
    for (int to = 0; to < 4; ++to) {
      if (to == w) word.v[to] = value;
    }
  }
  store_16(out + first, word);
  if (!fits) *misfit = 1;
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_repack_weight(const void* w, bool packed, int64_t n, int64_t k,
                                         bool nibbles, uint8_t* out, int32_t* misfit,
                                         void* stream) {
  const int64_t bytes = llmqat::layout_bytes(nibbles, n, k);
  const int64_t per_block = llmqat::kThreads * llmqat::kLoadBytes;
  const int64_t blocks = (bytes + llmqat::kTagBytes + per_block - 1) / per_block;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const llmqat::RowMajor from{static_cast<const uint8_t*>(w), n, k, packed};
  LLMQAT_LAUNCH(llmqat::repack_weight_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(llmqat::kThreads), stream, from, nibbles, bytes, out, misfit);
  return cudaGetLastError();
}
