// Weight layouts: see repack.h.

// gcc 12 takes the undefined registers inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "repack.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "int_matmul.h"
#include "llmqat/quant_math.h"

namespace llmqat::cpu {
namespace {

constexpr int kHalf = kPanelChannels / 2;

int signed_nibble(uint8_t byte, bool high) { return (((high ? byte >> 4 : byte) & 15) ^ 8) - 8; }

// One row of a row-major weight; columns beyond K and rows beyond N read as code 0.
struct Row {
  const uint8_t* bytes;  // nullptr: beyond N
  bool nibbles;
  int64_t k;

  Row(const void* w, Layout source, int64_t n, int64_t k, int64_t row)
      : bytes(nullptr), nibbles(source == Layout::nibbles), k(k) {
    if (row < n) bytes = static_cast<const uint8_t*>(w) + row * (nibbles ? ceil_div(k, 2) : k);
  }
  int code(int64_t column) const {
    if (bytes == nullptr || column >= k) return 0;
    return nibbles ? signed_nibble(bytes[column / 2], column % 2 != 0)
                   : static_cast<int8_t>(bytes[column]);
  }
};

void pack_rows8(const void* w, Layout source, int64_t n, int64_t k, int64_t row0, uint8_t* out) {
  const int64_t quads = ceil_div(k, kQuad);
  for (int i = 0; i < kPanelChannels; ++i) {
    const Row row(w, source, n, k, row0 + i);
    for (int64_t q = 0; q < quads; ++q) {
      uint8_t* to = out + q * kQuadBytes8 + kQuad * i;
      for (int j = 0; j < kQuad; ++j) to[j] = static_cast<uint8_t>(row.code(q * kQuad + j) + 128);
    }
  }
}

bool pack_rows4(const void* w, Layout source, int64_t n, int64_t k, int64_t row0, uint8_t* out) {
  const int64_t quads = ceil_div(k, kQuad);
  int outside = 0;
  for (int i = 0; i < kHalf; ++i) {
    const Row low(w, source, n, k, row0 + i), high(w, source, n, k, row0 + kHalf + i);
    for (int64_t q = 0; q < quads; ++q) {
      uint8_t* to = out + q * kQuadBytes4 + kQuad * i;
      for (int j = 0; j < kQuad; ++j) {
        const int u = low.code(q * kQuad + j) + 8, v = high.code(q * kQuad + j) + 8;
        outside |= (u | v) & ~15;
        to[j] = static_cast<uint8_t>(u | v << 4);
      }
    }
  }
  return outside == 0;
}

// ---- AVX-512: 16 rows by 64 columns at a time ---------------------------------------------------

#define LLMQAT_INLINE512 LLMQAT_TARGET_AVX512 __attribute__((always_inline)) inline

// Dword (i, j) to (j, i).
LLMQAT_INLINE512 void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // v[4b + i]: rows 4b..4b+3 of columns i, 4+i, 8+i, 12+i
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
  }
}

// 64 columns of one row as code + 128. mask covers the columns (or the nibble bytes) that exist.
LLMQAT_INLINE512 __m512i load_codes(const uint8_t* p, __mmask64 mask) {
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p),
                          _mm512_set1_epi8(static_cast<char>(0x80)));
}

LLMQAT_INLINE512 __m512i load_nibbles(const uint8_t* p, __mmask32 mask) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, p));
  const __m512i apart =
      _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(0x0F));
  return _mm512_add_epi8(_mm512_xor_si512(apart, _mm512_set1_epi8(8)), _mm512_set1_epi8(120));
}

LLMQAT_TARGET_AVX512 void pack_rows8_avx512(const uint8_t* w, bool nibbles, int64_t rows, int64_t k,
                                            uint8_t* out) {
  const int64_t row_bytes = nibbles ? ceil_div(k, 2) : k;
  const int64_t quads = ceil_div(k, kQuad);
  const int step = nibbles ? 32 : 64;
  for (int64_t q0 = 0, at = 0; q0 < quads; q0 += 16, at += step) {
    const int64_t left = row_bytes - at;
    const __mmask64 mask = left >= step ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    for (int half = 0; half < 2; ++half) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int row = half * 16 + i;
        const uint8_t* p = w + row * row_bytes + at;
        const __mmask64 here = row < rows ? mask : 0;  // a masked-out load touches no memory
        v[i] = nibbles ? load_nibbles(p, static_cast<__mmask32>(here)) : load_codes(p, here);
      }
      transpose16(v);
      uint8_t* to = out + q0 * kQuadBytes8 + half * 64;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (q0 + i < quads) _mm512_storeu_si512(to + i * kQuadBytes8, v[i]);
      }
    }
  }
}

float storage(float v) { return v; }
uint16_t storage(bf16 v) { return v.bits; }
float storage(fp16 v) { return to_float(v); }

float canonical(float v) { return v == v ? v : std::numeric_limits<float>::quiet_NaN(); }

}  // namespace

int panel_channels(Layout layout) {
  return layout == Layout::panels_f32 || layout == Layout::panels_bf16 ? kFloatPanel
                                                                       : kPanelChannels;
}

int64_t panel_bytes(Layout layout, int64_t k) {
  switch (layout) {
    case Layout::panels4: return ceil_div(k, kQuad) * kQuadBytes4;
    case Layout::panels_f32: return k * kFloatPanel * 4;
    case Layout::panels_bf16: return k * kFloatPanel * 2;
    default: return ceil_div(k, kQuad) * kQuadBytes8;  // panels8, and what row-major codes become
  }
}

int64_t packed_bytes(Layout layout, int64_t n, int64_t k) {
  return kHeaderBytes + ceil_div(n, panel_channels(layout)) * panel_bytes(layout, k);
}

bool read_header(const void* packed, int64_t bytes, PackedHeader& header) {
  if (bytes < kHeaderBytes) return false;
  std::memcpy(&header, packed, sizeof header);
  // The bounds keep packed_bytes of a foreign header from overflowing.
  constexpr int64_t kMax = int64_t{1} << 28;
  return header.magic == kPackedMagic && header.layout >= Layout::panels4 &&
         header.layout <= Layout::panels_bf16 && header.n >= 0 && header.n <= kMax &&
         header.k >= 0 && header.k <= kMax &&
         bytes == packed_bytes(header.layout, header.n, header.k);
}

void write_header(void* packed, Layout layout, int64_t n, int64_t k) {
  const PackedHeader header{kPackedMagic, layout, n, k, {}};
  std::memcpy(packed, &header, sizeof header);
}

bool repack_int(const void* w, Layout source, int64_t n, int64_t k, Layout target, int64_t begin,
                int64_t end, uint8_t* panels) {
  bool fits = true;
  for (int64_t p = begin; p < end; ++p) {
    uint8_t* out = panels + p * panel_bytes(target, k);
    if (target == Layout::panels4) {
      fits = pack_rows4(w, source, n, k, p * kPanelChannels, out) && fits;
    } else {
      pack_rows8(w, source, n, k, p * kPanelChannels, out);
    }
  }
  return fits;
}

void pack_panel8(Isa isa, const void* w, Layout source, int64_t n, int64_t k, int64_t panel,
                 uint8_t* out) {
  const int64_t row0 = panel * kPanelChannels;
  if (isa != Isa::avx512vnni) return pack_rows8(w, source, n, k, row0, out);
  const bool nibbles = source == Layout::nibbles;
  const uint8_t* first = static_cast<const uint8_t*>(w) + row0 * (nibbles ? ceil_div(k, 2) : k);
  pack_rows8_avx512(first, nibbles, n - row0, k, out);
}

template <class T>
void repack_float(const T* w, int64_t n, int64_t k, int64_t begin, int64_t end, void* panels) {
  using Stored = decltype(storage(T{}));
  for (int64_t p = begin; p < end; ++p) {
    Stored* out = static_cast<Stored*>(panels) + p * k * kFloatPanel;
    for (int i = 0; i < kFloatPanel; ++i) {
      const int64_t row = p * kFloatPanel + i;
      for (int64_t c = 0; c < k; ++c)
        out[c * kFloatPanel + i] = row < n ? storage(w[row * k + c]) : Stored{0};
    }
  }
}

// [channels, groups] -> convert of it [groups, ld], zeros beyond the channels.
template <class From, class To, class Convert>
static void by_group(const From* values, int64_t groups, int64_t channels, To* out, int64_t ld,
                     Convert convert) {
  constexpr int64_t kLine = 64 / sizeof(To);  // whole cache lines are written
  for (int64_t c = 0; c < ld; c += kLine) {
    const From* from = values + c * groups;
    const int64_t line = std::min(kLine, ld - c);
    const int64_t width = std::clamp<int64_t>(channels - c, 0, line);
    for (int64_t g = 0; g < groups; ++g) {
      To* to = out + g * ld + c;
      for (int64_t i = 0; i < width; ++i) to[i] = convert(from[i * groups + g]);
      for (int64_t i = width; i < line; ++i) to[i] = 0;
    }
  }
}

void scales_by_group(const float* scale, int64_t groups, int64_t channels, float* out, int64_t ld) {
  by_group(scale, groups, channels, out, ld, [](float value) { return canonical(value); });
}

void multipliers_by_group(const uint8_t* multiplier, int64_t groups, int64_t channels, int32_t* out,
                          int64_t ld) {
  by_group(multiplier, groups, channels, out, ld, [](uint8_t value) { return int32_t{value}; });
}

#define LLMQAT_INSTANTIATE(T) \
  template void repack_float<T>(const T*, int64_t, int64_t, int64_t, int64_t, void*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
