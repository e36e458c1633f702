// AVX2 integer tiles (no VNNI). Contract, layout and reasons: int_matmul.h.
//
// int4: vpmaddubsw of u4 and s8 gives pairs of at most 2 * 15 * 128 = 3840: no saturation.
// int8: the same instruction would saturate (2 * 255 * 128), so weights and activations are widened
// to 16 bits, even and odd bytes apart, and multiplied by vpmaddwd, which is exact. The widened
// weight is code = u - 128, so the offset is already gone and is added back to keep one contract
// for all tiles.
#include <immintrin.h>

#include <cstring>

#include "int_matmul.h"

namespace llmqat::cpu {
namespace {

#define LLMQAT_INLINE2 LLMQAT_TARGET_AVX2 __attribute__((always_inline)) inline

constexpr int kMaxRows = 4;  // 8 accumulators of 8 channels, and room for weights and activations

LLMQAT_INLINE2 __m256i broadcast_quad(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm256_set1_epi32(v);
}

LLMQAT_INLINE2 __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

LLMQAT_INLINE2 void finish(__m256i acc, int32_t init, int32_t* out, bool accumulate) {
  acc = _mm256_add_epi32(acc, _mm256_set1_epi32(init));
  if (accumulate) acc = _mm256_add_epi32(acc, load(out));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), acc);
}

// Channels 8h..8h+7 (low nibbles) and 16+8h.. (high nibbles) of one panel.
template <int R>
LLMQAT_TARGET_AVX2 void tile4_half(const TileArgs& t, const uint8_t* w, int32_t* out) {
  __m256i acc[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t q = 0; q < t.quads; ++q, w += kQuadBytes4) {
    const __m256i bytes = load(w);
    const __m256i low = _mm256_and_si256(bytes, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i x = broadcast_quad(t.a + r * t.lda + q * kQuad);
      acc[r][0] =
          _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
      acc[r][1] =
          _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    finish(acc[r][0], t.init[r], out + r * t.ldo, t.accumulate);
    finish(acc[r][1], t.init[r], out + r * t.ldo + 16, t.accumulate);
  }
}

LLMQAT_INLINE2 __m256i even_bytes(__m256i v) {
  return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
}
LLMQAT_INLINE2 __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }

// 8 channels of one panel: products of code = u - 128, plus 128 * sum(a) at the end.
template <int R>
LLMQAT_TARGET_AVX2 void tile8_quarter(const TileArgs& t, const uint8_t* w, int32_t* out) {
  __m256i acc[R], total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = total[r] = _mm256_setzero_si256();
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t q = 0; q < t.quads; ++q, w += kQuadBytes8) {
    const __m256i codes = _mm256_xor_si256(load(w), flip);
    const __m256i even = even_bytes(codes), odd = odd_bytes(codes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i x = broadcast_quad(t.a + r * t.lda + q * kQuad);
      const __m256i x_even = even_bytes(x), x_odd = odd_bytes(x);
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(even, x_even));
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(odd, x_odd));
      total[r] =
          _mm256_add_epi32(total[r], _mm256_madd_epi16(_mm256_add_epi16(x_even, x_odd), ones));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    finish(_mm256_add_epi32(acc[r], _mm256_slli_epi32(total[r], 7)), t.init[r], out + r * t.ldo,
           t.accumulate);
  }
}

template <int R>
void tile4_rows(const TileArgs& t) {
  for (int h = 0; h < 2; ++h) tile4_half<R>(t, t.panel + 32 * h, t.out + 8 * h);
}

template <int R>
void tile8_rows(const TileArgs& t) {
  for (int c = 0; c < 4; ++c) tile8_quarter<R>(t, t.panel + 32 * c, t.out + 8 * c);
}

using Tile = void (*)(const TileArgs&);
constexpr Tile kTiles4[] = {tile4_rows<1>, tile4_rows<2>, tile4_rows<3>, tile4_rows<4>};
constexpr Tile kTiles8[] = {tile8_rows<1>, tile8_rows<2>, tile8_rows<3>, tile8_rows<4>};

void run(const Tile (&tiles)[kMaxRows], int rows, int panels, const TileArgs& args) {
  TileArgs t = args;
  for (int p = 0; p < panels; ++p) {
    tiles[rows - 1](t);
    t.panel += t.panel_stride;
    t.out += kPanelChannels;
  }
}

void tile4(int rows, int panels, const TileArgs& args) { run(kTiles4, rows, panels, args); }
void tile8(int rows, int panels, const TileArgs& args) { run(kTiles8, rows, panels, args); }

int tile_panels(int) { return 1; }

LLMQAT_TARGET_AVX2 int32_t sum(const int8_t* a, int64_t n) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256i acc = _mm256_setzero_si256();  // vpsadbw adds unsigned bytes: shift the codes by 128
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i u = _mm256_xor_si256(load(a + i), flip);
    acc = _mm256_add_epi64(acc, _mm256_sad_epu8(u, _mm256_setzero_si256()));
  }
  int64_t parts[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), acc);
  int64_t total = parts[0] + parts[1] + parts[2] + parts[3] - 128 * i;
  for (; i < n; ++i) total += a[i];
  return static_cast<int32_t>(total);
}

}  // namespace

const IntKernels kIntKernelsAvx2 = {kMaxRows, tile_panels, tile4, tile8, nullptr, nullptr, sum};

}  // namespace llmqat::cpu
