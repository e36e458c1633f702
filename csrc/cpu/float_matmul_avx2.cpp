// AVX2 + FMA float tiles. Contract and reasons: float_matmul.h.
#include <immintrin.h>

#include "float_matmul.h"

namespace llmqat::cpu {
namespace {

#define LLMQAT_INLINE2 LLMQAT_TARGET_AVX2 __attribute__((always_inline)) inline

constexpr int kMaxRows = 6;  // 6 rows x 2 registers of 8: 12 accumulators of 16 registers

LLMQAT_INLINE2 __m256 load_weights(const float* p) { return _mm256_loadu_ps(p); }

LLMQAT_INLINE2 __m256 load_weights(const uint16_t* p) {  // bf16 is the upper half of fp32
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// P panels of 16 channels: 2 * P registers a row.
template <int R, int P, class W>
LLMQAT_TARGET_AVX2 void tile(const FloatTileArgs& t) {
  const W* w = static_cast<const W*>(t.panel);
  for (int64_t begin = 0; begin == 0 || begin < t.k; begin += kSumK) {
    __m256 acc[R][2 * P];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < 2 * P; ++p) acc[r][p] = _mm256_setzero_ps();
    const int64_t end = begin + block_length(t.k, begin);
    for (int64_t k = begin; k < end; ++k, w += kFloatPanel) {
      __m256 x[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) x[r] = _mm256_set1_ps(t.x[r * t.ldx + k]);
#pragma GCC unroll 8
      for (int p = 0; p < 2 * P; ++p) {
        const __m256 wp = load_weights(w + p / 2 * t.panel_stride + p % 2 * 8);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) acc[r][p] = _mm256_fmadd_ps(x[r], wp, acc[r][p]);
      }
    }
    const bool resume = t.resume || begin > 0;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < 2 * P; ++p) {
        float* out = t.out + r * t.ldo + 8 * p;
        const __m256 sum = acc[r][p];
        _mm256_storeu_ps(out, resume ? _mm256_add_ps(_mm256_loadu_ps(out), sum) : sum);
      }
  }
}

int tile_panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

using Tile = void (*)(const FloatTileArgs&);

// By rows, then log2 of panels.
template <class W>
constexpr Tile kTiles[kMaxRows + 1][3] = {
    {},
    {tile<1, 1, W>, tile<1, 2, W>, tile<1, 4, W>},
    {tile<2, 1, W>, tile<2, 2, W>},
    {tile<3, 1, W>, tile<3, 2, W>},
    {tile<4, 1, W>},
    {tile<5, 1, W>},
    {tile<6, 1, W>},
};

template <class W>
void run(int rows, int panels, const FloatTileArgs& args) {
  kTiles<W>[rows][__builtin_ctz(static_cast<unsigned>(panels))](args);
}

}  // namespace

const FloatKernels kFloatKernelsAvx2 = {kMaxRows, tile_panels, run<float>, run<uint16_t>};

}  // namespace llmqat::cpu
