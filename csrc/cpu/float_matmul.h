// y = x @ w.T in fp32 with weights in float panels (spec 17): the teacher's GEMM and the head.
//
// Math:    for every block of 128 k: s = fma(x[m, k], w[n, k], s) over k ascending from 0; the
//          blocks are added in order, then add(y, bias[n]), one cast.
// Shapes:  x [M, K] fp32; w panels [N / 16][K][16] in fp32 or bf16 (widened by a shift, exact), or
//          codes with scales (the A16 form of spec 7, repacked_linear.h), in panels or row-major:
//          then a group of panels is packed into a scratch first; y [M, N]. Work unit: one panel of
//          16 channels (codes: 32) for a range of rows.
// Tiling:  R rows x P panels, at most 28 accumulators of 32 registers (14 x 2 for many rows: 28 FMA
//          on 16 loads); one row takes 8 panels: two FMA a cycle of latency 4 need 8 chains, and 8
//          memory streams fill the bus. K in slices of 1024 and panels in groups of 512 KiB keep
//          the weights in L2 while all rows pass; the sums of a slice are added to those of the
//          slices before it.
// Cost:    2*M*N*K flops; one row reads N*K*4 (bf16: 2) bytes.
// Numerics: one fixed order of the sum for every output: the same bits for every batch size, cut,
//          thread count and instruction set. Blocks of 128 keep the error below that of usual GEMMs
//          (one chain over all k had 3-4 times it). bf16 storage gives the bits of the same
//          weights in fp32.
// Edges:   M, N or K = 0; N is padded to whole panels with zeros that are computed and not stored.
// Tests:   tests/kernels/test_float_matmul_native.py, test_linear_native.py,
//          test_repacked_linear_native.py
#pragma once

#include <cstdint>

#include "isa.h"
#include "quantized_matmul_tile.h"
#include "repack.h"
#include "repacked_linear.h"

namespace llmqat::cpu {

inline constexpr int64_t kSumK = 128;  // spec 17
inline constexpr int kMaxFloatRows = 14;
inline constexpr int kMaxFloatPanels = 8;
inline constexpr int kMaxFloatCells = 28 * kFloatPanel;  // rows * panels <= 28 in every tile

// Length of the block of the sum that begins at `begin`.
inline int64_t block_length(int64_t k, int64_t begin) {
  return k - begin < kSumK ? k - begin : kSumK;
}

struct FloatTileArgs {
  const float* x;
  int64_t ldx;
  const void* panel;     // first k of the slice in the first panel
  int64_t panel_stride;  // elements between panels
  int64_t k;             // of the slice
  bool resume;           // sums are added to out instead of written
  float* out;            // [rows, panels * 16]
  int64_t ldo;
  const void* ahead;  // k / 4 * 128 bytes to prefetch into L2 meanwhile, or nullptr
};

struct FloatKernels {
  int max_rows;
  int (*tile_panels)(int rows);  // powers of two; smaller powers are tiles, too
  void (*tile_f32)(int rows, int panels, const FloatTileArgs& args);
  void (*tile_bf16)(int rows, int panels, const FloatTileArgs& args);
};

const FloatKernels& float_kernels(Isa isa);
extern const FloatKernels kFloatKernelsAvx2;
extern const FloatKernels kFloatKernelsAvx512;

struct FloatProblem {
  const float* x;
  int64_t m, n, k;
  const void* w;  // panels behind the header, or row-major codes
  Layout layout;
  const float* w_scale = nullptr;  // codes only: [N, K / group_size]
  int64_t group_size = 0;          // codes only
  RoundTo round = RoundTo::none;   // codes only: dtype of the dequantized weight
  const float* bias;
  OutType out_type;
  void* y;
};

class FloatMatmul {
 public:
  explicit FloatMatmul(const FloatProblem& problem);
  int64_t panels() const { return ceil_div(p_.n, panel_channels(p_.layout)); }
  // Computes the channels of panels [panel_begin, panel_end) of y[row_begin:row_end]. Safe to call
  // from several threads.
  void run(int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) const;

 private:
  struct Group;
  void run_group(const Group& group, int64_t row_begin, int64_t row_end) const;
  void run_few(int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) const;
  void unpack(const Group& group, int64_t begin, int64_t end, float* out) const;
  CodePanels codes(int64_t panel, int64_t count) const;

  FloatProblem p_;
  Isa isa_;
  const FloatKernels& kernels_;
  const CodeKernels& code_kernels_;
  const TileEnd& end_;
  bool bf16_;
  bool codes_;  // integer codes, in panels or row-major
};

}  // namespace llmqat::cpu
