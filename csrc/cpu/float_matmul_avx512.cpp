// AVX-512 float tiles. Contract and reasons: float_matmul.h.

// gcc 12 takes the undefined registers inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "float_matmul.h"

namespace llmqat::cpu {
namespace {

#define LLMQAT_INLINE512 LLMQAT_TARGET_AVX512 __attribute__((always_inline)) inline

LLMQAT_INLINE512 __m512 load_weights(const float* p) { return _mm512_loadu_ps(p); }

LLMQAT_INLINE512 __m512 load_weights(const uint16_t* p) {  // bf16 is the upper half of fp32
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int R, int P, class W>
LLMQAT_INLINE512 void k_step(__m512 (&acc)[R][P], const float* const* base, int64_t ldx, int64_t k,
                             const W* w, int64_t stride) {
  if constexpr (R <= 3) {  // keep the activations, stream the panels
    __m512 x[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) x[r] = _mm512_set1_ps(base[0][r * ldx + k]);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512 wp = load_weights(w + p * stride);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) acc[r][p] = _mm512_fmadd_ps(x[r], wp, acc[r][p]);
    }
  } else {  // keep the weights, stream the activations
    __m512 wp[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) wp[p] = load_weights(w + p * stride);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(base[r / 3][(r % 3) * ldx + k]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[r][p] = _mm512_fmadd_ps(x, wp[p], acc[r][p]);
    }
  }
}

template <int R, int P, class W>
LLMQAT_TARGET_AVX512 void tile(const FloatTileArgs& t) {
  constexpr int kBases =
      (R + 2) / 3;  // row r is base[r / 3] + (r % 3) * ldx: one address, few pointers
  const float* base[kBases];
  const int64_t ldx = t.ldx, stride = t.panel_stride;
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) base[i] = t.x + 3 * i * ldx;
  const W* w = static_cast<const W*>(t.panel);
  const char* ahead = static_cast<const char*>(t.ahead);

  for (int64_t begin = 0; begin == 0 || begin < t.k; begin += kSumK) {
    __m512 acc[R][P];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[r][p] = _mm512_setzero_ps();

    const int64_t length = block_length(t.k, begin);
    int64_t k = 0;
    for (; k + 4 <= length; k += 4) {
      if constexpr (R >= 7) {  // about 50 cycles of arithmetic hide two lines
        if (ahead != nullptr) {
          _mm_prefetch(ahead, _MM_HINT_T1);
          _mm_prefetch(ahead + 64, _MM_HINT_T1);
          ahead += 128;
        }
      }
      k_step<R, P>(acc, base, ldx, 0, w, stride);
      k_step<R, P>(acc, base, ldx, 1, w + kFloatPanel, stride);
      k_step<R, P>(acc, base, ldx, 2, w + 2 * kFloatPanel, stride);
      k_step<R, P>(acc, base, ldx, 3, w + 3 * kFloatPanel, stride);
      w += 4 * kFloatPanel;
#pragma GCC unroll 5
      for (int i = 0; i < kBases; ++i) base[i] += 4;
    }
    for (; k < length; ++k) {
      k_step<R, P>(acc, base, ldx, 0, w, stride);
      w += kFloatPanel;
#pragma GCC unroll 5
      for (int i = 0; i < kBases; ++i) base[i] += 1;
    }

    const bool resume = t.resume || begin > 0;
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        float* out = t.out + r * t.ldo + p * kFloatPanel;
        const __m512 sum = acc[r][p];
        _mm512_storeu_ps(out, resume ? _mm512_add_ps(_mm512_loadu_ps(out), sum) : sum);
      }
  }
}

int tile_panels(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }

using Tile = void (*)(const FloatTileArgs&);

// By rows, then log2 of panels.
template <class W>
constexpr Tile kTiles[kMaxFloatRows + 1][4] = {
    {},
    {tile<1, 1, W>, tile<1, 2, W>, tile<1, 4, W>, tile<1, 8, W>},
    {tile<2, 1, W>, tile<2, 2, W>, tile<2, 4, W>, tile<2, 8, W>},
    {tile<3, 1, W>, tile<3, 2, W>, tile<3, 4, W>, tile<3, 8, W>},
    {tile<4, 1, W>, tile<4, 2, W>, tile<4, 4, W>},
    {tile<5, 1, W>, tile<5, 2, W>, tile<5, 4, W>},
    {tile<6, 1, W>, tile<6, 2, W>, tile<6, 4, W>},
    {tile<7, 1, W>, tile<7, 2, W>},
    {tile<8, 1, W>, tile<8, 2, W>},
    {tile<9, 1, W>, tile<9, 2, W>},
    {tile<10, 1, W>, tile<10, 2, W>},
    {tile<11, 1, W>, tile<11, 2, W>},
    {tile<12, 1, W>, tile<12, 2, W>},
    {tile<13, 1, W>, tile<13, 2, W>},
    {tile<14, 1, W>, tile<14, 2, W>},
};

template <class W>
void run(int rows, int panels, const FloatTileArgs& args) {
  kTiles<W>[rows][__builtin_ctz(static_cast<unsigned>(panels))](args);
}

}  // namespace

const FloatKernels kFloatKernelsAvx512 = {kMaxFloatRows, tile_panels, run<float>, run<uint16_t>};

}  // namespace llmqat::cpu
