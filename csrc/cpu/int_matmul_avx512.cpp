// AVX-512 VNNI integer tiles. Contract, layout and reasons: int_matmul.h.

// gcc 12 takes the undefined registers inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "int_matmul.h"

namespace llmqat::cpu {
namespace {

#define LLMQAT_INLINE512 LLMQAT_TARGET_AVX512 __attribute__((always_inline)) inline

LLMQAT_INLINE512 __m512i broadcast_quad(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}

// Row r of a block without one pointer a row: base[r / 3] + (r % 3) * lda is a single x86 address.
template <int R>
struct RowBases {
  static constexpr int kCount = (R + 2) / 3;
  const int8_t* base[kCount];
};

// One quad of R rows against P panels. int4 multiplies the low nibbles and the whole byte
// (16 * high + low): one AND a register instead of shift and two ANDs; the end separates them.
template <int R, int P, bool kInt4>
LLMQAT_INLINE512 void quad_step(__m512i (&acc)[R][P][2], const RowBases<R>& rows, int64_t lda,
                                int64_t a_offset, const uint8_t* w, int64_t stride,
                                __m512i nibble) {
  if constexpr (R <= 4) {  // keep the activations in registers, stream the panels
    __m512i x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = broadcast_quad(rows.base[r / 3] + (r % 3) * lda + a_offset);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512i w1 = _mm512_loadu_si512(w + p * stride + (kInt4 ? 0 : 64));
      const __m512i w0 = kInt4 ? _mm512_and_si512(w1, nibble) : _mm512_loadu_si512(w + p * stride);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][p][0] = _mm512_dpbusd_epi32(acc[r][p][0], w0, x[r]);
        acc[r][p][1] = _mm512_dpbusd_epi32(acc[r][p][1], w1, x[r]);
      }
    }
  } else {  // keep the weights in registers, stream the activations
    __m512i w0[P], w1[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      w1[p] = _mm512_loadu_si512(w + p * stride + (kInt4 ? 0 : 64));
      w0[p] = kInt4 ? _mm512_and_si512(w1[p], nibble) : _mm512_loadu_si512(w + p * stride);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i x = broadcast_quad(rows.base[r / 3] + (r % 3) * lda + a_offset);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        acc[r][p][0] = _mm512_dpbusd_epi32(acc[r][p][0], w0[p], x);
        acc[r][p][1] = _mm512_dpbusd_epi32(acc[r][p][1], w1[p], x);
      }
    }
  }
}

template <int R, int P, bool kInt4>
LLMQAT_TARGET_AVX512 void tile(const TileArgs& t) {
  constexpr int64_t kQuadBytes = kInt4 ? kQuadBytes4 : kQuadBytes8;
  __m512i acc[R][P][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[r][p][0] = acc[r][p][1] = _mm512_setzero_si512();

  const __m512i nibble = _mm512_set1_epi8(0x0F);
  const int64_t lda = t.lda, stride = t.panel_stride;
  RowBases<R> rows;
#pragma GCC unroll 4
  for (int i = 0; i < RowBases<R>::kCount; ++i) rows.base[i] = t.a + 3 * i * lda;
  const uint8_t* w = t.panel;

  int64_t q = 0;
  for (; q + 4 <= t.quads; q += 4) {
    quad_step<R, P, kInt4>(acc, rows, lda, 0, w, stride, nibble);
    quad_step<R, P, kInt4>(acc, rows, lda, 4, w + kQuadBytes, stride, nibble);
    quad_step<R, P, kInt4>(acc, rows, lda, 8, w + 2 * kQuadBytes, stride, nibble);
    quad_step<R, P, kInt4>(acc, rows, lda, 12, w + 3 * kQuadBytes, stride, nibble);
#pragma GCC unroll 4
    for (int i = 0; i < RowBases<R>::kCount; ++i) rows.base[i] += 16;
    w += 4 * kQuadBytes;
  }
  for (; q < t.quads; ++q) {
    quad_step<R, P, kInt4>(acc, rows, lda, 0, w, stride, nibble);
#pragma GCC unroll 4
    for (int i = 0; i < RowBases<R>::kCount; ++i) rows.base[i] += 4;
    w += kQuadBytes;
  }

#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const __m512i init = _mm512_set1_epi32(t.init[r]);
    int32_t* out = t.out + r * t.ldo;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p, out += kPanelChannels) {
      __m512i low = acc[r][p][0];
      __m512i high =
          kInt4 ? _mm512_srai_epi32(_mm512_sub_epi32(acc[r][p][1], low), 4) : acc[r][p][1];
      low = _mm512_add_epi32(low, init);
      high = _mm512_add_epi32(high, init);
      if (t.accumulate) {
        low = _mm512_add_epi32(low, _mm512_loadu_si512(out));
        high = _mm512_add_epi32(high, _mm512_loadu_si512(out + 16));
      }
      _mm512_storeu_si512(out, low);
      _mm512_storeu_si512(out + 16, high);
    }
  }
}

// 24 accumulators at most; 8 panels at most because that is where more streams stop helping.
constexpr int panels_of(int rows) {
  return rows == 1 ? 8 : rows == 2 ? 6 : rows == 3 ? 4 : rows == 4 ? 3 : rows <= 6 ? 2 : 1;
}

int tile_panels(int rows) { return panels_of(rows); }

using Tile = void (*)(const TileArgs&);

template <bool kInt4, int R, int... P>
constexpr void fill_row(Tile (&row)[kMaxTilePanels + 1], std::integer_sequence<int, P...>) {
  ((row[P + 1] = tile<R, P + 1, kInt4>), ...);
}

template <bool kInt4>
struct TileTable {
  Tile at[kMaxTileRows + 1][kMaxTilePanels + 1] = {};
  constexpr TileTable() { fill(std::make_integer_sequence<int, kMaxTileRows>()); }
  template <int... R>
  constexpr void fill(std::integer_sequence<int, R...>) {
    (fill_row<kInt4, R + 1>(at[R + 1], std::make_integer_sequence<int, panels_of(R + 1)>()), ...);
  }
};

constexpr TileTable<true> kTiles4;
constexpr TileTable<false> kTiles8;

void tile4(int rows, int panels, const TileArgs& args) { kTiles4.at[rows][panels](args); }
void tile8(int rows, int panels, const TileArgs& args) { kTiles8.at[rows][panels](args); }

// ---- row-major dot products ---------------------------------------------------------------------

LLMQAT_INLINE512 __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

// 64 weight bytes of C channels against R rows. The flipped sign bit turns a two's complement code
// into code + 128 (or code + 8), unsigned.
template <int R, int C, bool kInt4>
LLMQAT_INLINE512 void dot_step(__m512i (&acc)[R][C], const DotArgs& t, int64_t at, __mmask64 mask) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(kInt4 ? 0x88 : 0x80));
  const __m512i nibble = _mm512_set1_epi8(0x0F);
  __m512i x0[R], x1[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    x0[r] = _mm512_maskz_loadu_epi8(mask, t.a + r * t.lda + at);
    if constexpr (kInt4) x1[r] = _mm512_maskz_loadu_epi8(mask, t.a + r * t.lda + t.odd_offset + at);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, t.w + c * t.ldw + at), flip);
    const __m512i even = kInt4 ? _mm512_and_si512(w, nibble) : w;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], even, x0[r]);
    if constexpr (kInt4) {
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], odd, x1[r]);
    }
  }
}

template <int R, int C, bool kInt4>
LLMQAT_TARGET_AVX512 void dot(const DotArgs& t) {
  __m512i acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + 64 <= t.bytes; at += 64) dot_step<R, C, kInt4>(acc, t, at, ~__mmask64{0});
  if (at < t.bytes) dot_step<R, C, kInt4>(acc, t, at, first_bytes(t.bytes - at));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      t.out[r * t.ldo + c] = t.init[r] + _mm512_reduce_add_epi32(acc[r][c]);
}

template <bool kInt4>
void dot_any(int rows, int channels, const DotArgs& args) {
  DotArgs t = args;
  // 8 weight rows for one activation row (memory streams), else 4: 8 to 16 accumulators.
  const int wide = rows == 1 ? 8 : 4;
  for (int c = 0; c < channels;) {
    const bool whole = channels - c >= wide;
    switch (rows * 2 + (whole ? 1 : 0)) {
      case 2: dot<1, 1, kInt4>(t); break;
      case 3: dot<1, 8, kInt4>(t); break;
      case 4: dot<2, 1, kInt4>(t); break;
      case 5: dot<2, 4, kInt4>(t); break;
      case 6: dot<3, 1, kInt4>(t); break;
      case 7: dot<3, 4, kInt4>(t); break;
      case 8: dot<4, 1, kInt4>(t); break;
      default: dot<4, 4, kInt4>(t); break;
    }
    const int step = whole ? wide : 1;
    c += step;
    t.w += step * t.ldw;
    t.out += step;
  }
}

LLMQAT_TARGET_AVX512 int32_t sum(const int8_t* a, int64_t n) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) acc = _mm512_dpbusd_epi32(acc, ones, _mm512_loadu_si512(a + i));
  if (i < n)
    acc = _mm512_dpbusd_epi32(acc, ones, _mm512_maskz_loadu_epi8(first_bytes(n - i), a + i));
  return _mm512_reduce_add_epi32(acc);
}

}  // namespace

const IntKernels kIntKernelsAvx512 = {kMaxTileRows,  tile_panels,    tile4, tile8,
                                      dot_any<true>, dot_any<false>, sum};

}  // namespace llmqat::cpu
