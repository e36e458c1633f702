// See quantized_matmul_tile.h. One body, compiled once per instruction set: the loops vectorize,
// the operations are the scalar ones of quant_math.h, so the bits are the same.

// gcc 12 takes the undefined registers inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "quantized_matmul_tile.h"

#include <immintrin.h>

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

// sum + a * b modulo 2^32: codes or multipliers out of range (spec 18) wrap, with any instructions.
LLMQAT_BODY int32_t wrapped(int32_t a, int32_t b, int32_t sum) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) +
                              static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

LLMQAT_BODY void weigh_body(const int32_t* acc, int64_t ld, int rows, int cols,
                            const int32_t* multiplier, bool first, int32_t* out) {
  for (int r = 0; r < rows; ++r, acc += ld, out += ld) {
    if (first) {
      for (int c = 0; c < cols; ++c) out[c] = wrapped(acc[c], multiplier[c], 0);
    } else {
      for (int c = 0; c < cols; ++c) out[c] = wrapped(acc[c], multiplier[c], out[c]);
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

#define LLMQAT_TILE_STORE(NAME, TARGET)                                                        \
  TARGET void store_##NAME(const float* in, int64_t ld, int rows, int cols, const float* bias, \
                           OutType type, void* y, int64_t ldy) {                               \
    store_body(in, ld, rows, cols, bias, type, y, ldy);                                        \
  }

LLMQAT_TILE_STORE(scalar, )
LLMQAT_TILE_STORE(avx2, LLMQAT_TARGET_AVX2)
LLMQAT_TILE_STORE(avx512, LLMQAT_TARGET_AVX512)

void scale_scalar(const int32_t* acc, int64_t ld, int rows, int cols, const float* sx,
                  const float* sw, bool first, float* out) {
  scale_body(acc, ld, rows, cols, sx, sw, first, out);
}

LLMQAT_TARGET_AVX2 void scale_avx2(const int32_t* acc, int64_t ld, int rows, int cols,
                                   const float* sx, const float* sw, bool first, float* out) {
  scale_body(acc, ld, rows, cols, sx, sw, first, out);
}

// Written out: with small groups this runs every few quads, and compilers version the loop for
// aliasing and short rows instead of using masks.
LLMQAT_TARGET_AVX512 void scale_avx512(const int32_t* acc, int64_t ld, int rows, int cols,
                                       const float* sx, const float* sw, bool first, float* out) {
  for (int c = 0; c < cols; c += 16) {
    const __mmask16 mask = cols - c >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << (cols - c)) - 1);
    const __m512 w = _mm512_maskz_loadu_ps(mask, sw + c);
    for (int r = 0; r < rows; ++r) {
      const __m512 sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc + r * ld + c));
      const __m512 term = _mm512_mul_ps(sums, _mm512_mul_ps(_mm512_set1_ps(sx[r]), w));
      float* to = out + r * ld + c;
      _mm512_storeu_ps(to, first ? term : _mm512_add_ps(_mm512_loadu_ps(to), term));
    }
  }
}

void weigh_scalar(const int32_t* acc, int64_t ld, int rows, int cols, const int32_t* multiplier,
                  bool first, int32_t* out) {
  weigh_body(acc, ld, rows, cols, multiplier, first, out);
}

LLMQAT_TARGET_AVX2 void weigh_avx2(const int32_t* acc, int64_t ld, int rows, int cols,
                                   const int32_t* multiplier, bool first, int32_t* out) {
  weigh_body(acc, ld, rows, cols, multiplier, first, out);
}

// Written out as scale_avx512 is.
LLMQAT_TARGET_AVX512 void weigh_avx512(const int32_t* acc, int64_t ld, int rows, int cols,
                                       const int32_t* multiplier, bool first, int32_t* out) {
  for (int c = 0; c < cols; c += 16) {
    const __mmask16 mask = cols - c >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << (cols - c)) - 1);
    const __m512i m = _mm512_maskz_loadu_epi32(mask, multiplier + c);
    for (int r = 0; r < rows; ++r) {
      const __m512i term = _mm512_mullo_epi32(_mm512_loadu_si512(acc + r * ld + c), m);
      int32_t* to = out + r * ld + c;
      _mm512_storeu_si512(to, first ? term : _mm512_add_epi32(_mm512_loadu_si512(to), term));
    }
  }
}

constexpr TileEnd kEndScalar = {scale_scalar, weigh_scalar, store_scalar};
constexpr TileEnd kEndAvx2 = {scale_avx2, weigh_avx2, store_avx2};
constexpr TileEnd kEndAvx512 = {scale_avx512, weigh_avx512, store_avx512};

}  // namespace

const TileEnd& tile_end(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return kEndAvx512;
    case Isa::avx2: return kEndAvx2;
    default: return kEndScalar;
  }
}

}  // namespace llmqat::cpu
