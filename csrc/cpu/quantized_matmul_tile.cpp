// See quantized_matmul_tile.h. One body, compiled once per instruction set: the loops vectorize,
// the operations are the scalar ones of quant_math.h, so the bits are the same.
#include "quantized_matmul_tile.h"

#include "llmqat/quant_math.h"

namespace llmqat::cpu {
namespace {

#define LLMQAT_BODY __attribute__((always_inline)) inline

LLMQAT_BODY void scale_body(const int32_t* acc, int64_t ld, int rows, int cols, const float* sx,
                            const float* sw, bool first, float* out) {
  for (int r = 0; r < rows; ++r, acc += ld, out += ld) {
    const float s = sx[r];
    if (first) {
      for (int c = 0; c < cols; ++c) out[c] = static_cast<float>(acc[c]) * (s * sw[c]);
    } else {
      for (int c = 0; c < cols; ++c) out[c] += static_cast<float>(acc[c]) * (s * sw[c]);
    }
  }
}

template <class T>
LLMQAT_BODY void store_rows(const float* in, int64_t ld, int rows, int cols, const float* bias,
                            T* y, int64_t ldy) {
  for (int r = 0; r < rows; ++r, in += ld, y += ldy) {
    if (bias != nullptr) {
      for (int c = 0; c < cols; ++c) y[c] = from_float<T>(in[c] + bias[c]);
    } else {
      for (int c = 0; c < cols; ++c) y[c] = from_float<T>(in[c]);
    }
  }
}

LLMQAT_BODY void store_body(const float* in, int64_t ld, int rows, int cols, const float* bias,
                            OutType type, void* y, int64_t ldy) {
  switch (type) {
    case OutType::bfloat16: return store_rows(in, ld, rows, cols, bias, static_cast<bf16*>(y), ldy);
    case OutType::float16: return store_rows(in, ld, rows, cols, bias, static_cast<fp16*>(y), ldy);
    default: return store_rows(in, ld, rows, cols, bias, static_cast<float*>(y), ldy);
  }
}

#define LLMQAT_TILE_END(NAME, TARGET)                                                           \
  TARGET void scale_##NAME(const int32_t* acc, int64_t ld, int rows, int cols, const float* sx, \
                           const float* sw, bool first, float* out) {                           \
    scale_body(acc, ld, rows, cols, sx, sw, first, out);                                        \
  }                                                                                             \
  TARGET void store_##NAME(const float* in, int64_t ld, int rows, int cols, const float* bias,  \
                           OutType type, void* y, int64_t ldy) {                                \
    store_body(in, ld, rows, cols, bias, type, y, ldy);                                         \
  }                                                                                             \
  constexpr TileEnd kEnd_##NAME = {scale_##NAME, store_##NAME};

LLMQAT_TILE_END(scalar, )
LLMQAT_TILE_END(avx2, LLMQAT_TARGET_AVX2)
LLMQAT_TILE_END(avx512, LLMQAT_TARGET_AVX512)

}  // namespace

const TileEnd& tile_end(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return kEnd_avx512;
    case Isa::avx2: return kEnd_avx2;
    default: return kEnd_scalar;
  }
}

}  // namespace llmqat::cpu
