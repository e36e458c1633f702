// Integer tile kernels: exact int32 accumulators of int8 activations against weight panels.
//
// Math:    acc[r, n] = init[r] + sum_k a[r, k] * u[n, k] (spec 7), where u = code + 8 (int4 panels)
//          or code + 128 (int8 panels) is unsigned because vpdpbusd wants one unsigned side; the
//          caller passes init[r] = -offset * sum_k a[r, k]. All sums are modulo 2^32, so an
//          intermediate overflow is harmless whenever the result fits.
// Shapes:  a panel holds 32 channels (two zmm of int32). For each quad of 4 consecutive k it has
//          - int4: 64 bytes, byte[4i + j] = u[i][k+j] | u[16 + i][k+j] << 4: both nibbles of a
//            register land in the accumulator lane of their own channel, so there are no horizontal
//            sums;
//          - int8: 128 bytes, byte[4i + j] = u[i][k+j], i = 0..31.
// Tiling:  rows x panels chosen so that 10 to 24 accumulators are live: enough to hide the 5-cycle
//          latency of two vpdpbusd a cycle, few enough for 32 registers. See tile_panels().
// Cost:    2 * rows * 32 * K operations a panel; one row is bound by reading the panel (K/2 or K
//          bytes a channel): up to 8 panels are streamed at once because one hardware stream does
//          not fill the memory bus of one core (measured: 13 GB/s with 1 stream, 16 with 8).
// Numerics: exact; every instruction set gives the same bits.
// Edges:   quads may be 0. Activations beyond K inside the last quad must be 0 (the caller pads).
// Tests:   tests/kernels/test_matmul_native.py
#pragma once

#include <cstdint>

#include "isa.h"

namespace llmqat::cpu {

inline constexpr int kPanelChannels = 32;
inline constexpr int kQuad = 4;
inline constexpr int kQuadBytes4 = 64;
inline constexpr int kQuadBytes8 = 128;
// Largest K of one tile call: whole int4 bytes times activations, |sum| <= 255 * 128 * K < 2^31.
inline constexpr int64_t kMaxTileK = 65536;
inline constexpr int kMaxTileRows = 12;
inline constexpr int kMaxTilePanels = 8;
inline constexpr int kMaxTileCells = 12 * kPanelChannels;  // rows * panels <= 12 in every tile

struct TileArgs {
  const int8_t* a;       // first row; quads * 4 readable bytes in each row
  int64_t lda;           // bytes between rows
  const uint8_t* panel;  // first quad of the first panel
  int64_t panel_stride;  // bytes between panels
  int64_t quads;
  const int32_t* init;  // one start value a row
  int32_t* out;         // [rows, panels * 32]
  int64_t ldo;          // elements between rows of out
  bool accumulate;      // out += instead of out =
};

// Rows against up to 8 row-major weight rows, for few activations (no panel is built).
struct DotArgs {
  const int8_t* a;  // int8 weights: rows of K. Nibbles: K/2 even columns, then K/2 odd ones
  int64_t lda;
  int64_t odd_offset;  // nibbles only: bytes from the even columns to the odd ones
  const uint8_t* w;    // first weight row
  int64_t ldw;
  int64_t bytes;  // weight bytes of a row to use
  const int32_t* init;
  int32_t* out;
  int64_t ldo;
};

struct IntKernels {
  int max_rows;
  // Most panels one tile takes with this many rows (1 .. max_rows).
  int (*tile_panels)(int rows);
  void (*tile4)(int rows, int panels, const TileArgs& args);
  void (*tile8)(int rows, int panels, const TileArgs& args);
  // nullptr where packing a panel first is as good. rows <= 4, channels <= 8.
  void (*dot4)(int rows, int channels, const DotArgs& args);
  void (*dot8)(int rows, int channels, const DotArgs& args);
  // sum of n codes.
  int32_t (*sum)(const int8_t* a, int64_t n);
};

const IntKernels& int_kernels(Isa isa);

// One table per instruction set, each in its own file.
extern const IntKernels kIntKernelsScalar;
extern const IntKernels kIntKernelsAvx2;
extern const IntKernels kIntKernelsAvx512;

}  // namespace llmqat::cpu
