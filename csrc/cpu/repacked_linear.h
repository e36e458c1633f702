// y = x @ w.T for float x and integer codes in panels4 or panels8: the A16 form of spec 7, kept in
// memory at the width of its codes.
//
// Math:    w[n, k] = round_d(mul(code[n, k], scale[n, k / group])) (spec 5, d = dtype of x), then
//          the sum of float_matmul.h in its order (spec 17).
// Shapes:  panels of repack.h (32 channels, quads of k); x [rows, K] fp32; scales by group,
//          [groups, ld], one column a channel. Work unit: one panel.
// Tiling:  few rows unpack in registers: a nibble is the index of a table of 16 floats (AVX-512: a
//          permutation, which looks at the low 4 bits of a lane alone), a byte the mantissa of
//          2^23; then the scale (and 4 instructions to round to 16 bits), then one FMA a row. So a
//          vector of 16 weights takes 4 instructions for the first row (5 from bytes) and 1 for
//          each other. One row takes 4 panels, 8 chains of sums, enough for the latency of the FMA.
//          Every block of rows unpacks anew: beyond max_rows the driver (float_matmul.cpp) unpacks
//          a slice once into a scratch in L2 and multiplies it as float panels.
// Cost:    2*M*N*K flops; one row reads N*K/2 (panels8: N*K) bytes.
// Numerics: the bits of float_matmul on the dequantized weight, for every batch size, cut, thread
//          count and instruction set.
// Edges:   any K and any group size; channels beyond N have scale 0 and are not stored. A NaN scale
//          makes its channel NaN.
// Tests:   tests/kernels/test_repacked_linear_native.py
// Bench:   python -m benchmarks.run --op repacked_linear
#pragma once

#include <cstdint>

#include "int_matmul.h"
#include "isa.h"
#include "repack.h"

namespace llmqat::cpu {

inline constexpr int kMaxCodeCells = 8 * kPanelChannels;  // rows * panels <= 8 in every tile

enum class RoundTo { none, bfloat16, float16 };

struct CodePanels {
  const uint8_t* first;  // first quad of the first panel
  int64_t stride;        // bytes between panels
  const float* scale;    // [groups, ld], the column of the first channel
  int64_t ld;
  int64_t group_size;
  bool nibbles;   // panels4
  RoundTo round;  // dtype of the dequantized weight
};

struct CodeTileArgs {
  const float* x;
  int64_t ldx;
  int64_t k;
  CodePanels w;
  float* out;  // [rows, panels * 32]
};

struct CodeKernels {
  int max_rows;
  int (*tile_panels)(int rows);  // powers of two; smaller powers are tiles, too
  void (*tile)(int rows, int panels, const CodeTileArgs& args);
  // k of [begin, end) of one panel as floats: channels 0..15 to low[k - begin][16], the others to
  // high (nullptr: not wanted).
  void (*unpack)(const CodePanels& w, int64_t begin, int64_t end, float* low, float* high);
};

const CodeKernels& code_kernels(Isa isa);

// First k after `begin` that is in another group or not before `end`.
inline int64_t group_end(const CodePanels& w, int64_t begin, int64_t end) {
  const int64_t next = (begin / w.group_size + 1) * w.group_size;
  return next < end ? next : end;
}

}  // namespace llmqat::cpu
