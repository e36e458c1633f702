// Weight layouts of the CPU matrix kernels: a pure permutation of the codes (or floats), spec 8.
//
// Math:    none. panels4 / panels8: see int_matmul.h; floats: [ceil(N / 16)][K][16], in the storage
//          dtype.
// Shapes:  in: row-major w [N, K] (int8 codes, packed nibbles [N, ceil(K / 2)], or floats). Out:
//          one opaque run of bytes: a 64-byte header, then the panels. N is padded to whole panels
//          and K to whole quads with code 0 (floats: N only, with 0).
// Tiling:  panels of 32 (16 floats) channels because the accumulators are then registers by channel
//          and nothing is summed across lanes; the header is one cache line so that panels stay
//          aligned.
// Cost:    reads w once, writes it once; done when a model is loaded, except pack_panel8, which the
//          matmul of a row-major weight runs into a cache-resident scratch (16x16 transposes in
//          registers).
// Numerics: exact.
// Edges:   N = 0 and K = 0 give the header alone. Codes outside [-8, 7] do not fit panels4:
//          reported.
// Tests:   tests/kernels/test_repack_native.py (inverse, every nibble, odd sizes)
#pragma once

#include <cstdint>

#include "isa.h"

namespace llmqat::cpu {

enum class Layout : uint32_t {
  codes = 0,    // row-major int8
  nibbles = 1,  // row-major packed int4
  panels4 = 2,  // repacked
  panels8 = 3,
  panels_f32 = 4,
  panels_bf16 = 5,
};

inline constexpr uint32_t kPackedMagic = 0x3151514C;  // "LQQ1"
inline constexpr int64_t kHeaderBytes = 64;
inline constexpr int kFloatPanel = 16;  // channels: one zmm of fp32

struct PackedHeader {
  uint32_t magic;
  Layout layout;
  int64_t n;
  int64_t k;
  uint8_t unused[kHeaderBytes - 24];
};
static_assert(sizeof(PackedHeader) == kHeaderBytes);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one panel, and channels in it.
int64_t panel_bytes(Layout layout, int64_t k);
int panel_channels(Layout layout);
// Whole size, header included.
int64_t packed_bytes(Layout layout, int64_t n, int64_t k);

// false if the bytes are not what packed_bytes says for their own header.
bool read_header(const void* packed, int64_t bytes, PackedHeader& header);
void write_header(void* packed, Layout layout, int64_t n, int64_t k);

// Integer panels [begin, end) of out (behind the header). source is codes or nibbles, target
// panels4 or panels8. Returns false if a code does not fit 4 bits.
bool repack_int(const void* w, Layout source, int64_t n, int64_t k, Layout target, int64_t begin,
                int64_t end, uint8_t* panels);

// Float panels [begin, end): T is float (to panels_f32), bf16 (to panels_bf16) or fp16 (to
// panels_f32, exact).
template <class T>
void repack_float(const T* w, int64_t n, int64_t k, int64_t begin, int64_t end, void* panels);

// One panel of u8 = code + 128 (panels8) from a row-major weight.
void pack_panel8(Isa isa, const void* w, Layout source, int64_t n, int64_t k, int64_t panel,
                 uint8_t* out);

// Scales [channels, groups] of weight rows as [groups, ld]: one column a channel, 0 beyond them.
// Every NaN becomes the canonical one.
void scales_by_group(const float* scale, int64_t groups, int64_t channels, float* out, int64_t ld);

// Integer multipliers in the same way.
void multipliers_by_group(const uint8_t* multiplier, int64_t groups, int64_t channels, int32_t* out,
                          int64_t ld);

}  // namespace llmqat::cpu
