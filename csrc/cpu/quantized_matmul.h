// y = a @ w.T for int8 activation codes and quantized weights (spec 7, 18), in one object per call.
//
// Math:    acc = sum_k a*w per group, exact int32; y = sum_g mul(float(acc_g), mul(sx, sw_g)) +
//          bias, one cast; with integer multipliers y = mul(float(sum_g m_g * acc_g), mul(sx, sw))
//          + bias. OutType::int32 stores the accumulators instead (int_matmul).
// Shapes:  a [M, K], sx [M], w [N, K] in any integer Layout, sw [N] or [N, K / group_size] (with
//          multipliers m [N, K / group_size]: sw [N]), bias [N] fp32, y [M, N]. Work unit: one
//          panel of 32 channels for a range of rows.
// Tiling:  rows in equal blocks of at most 12 (int_matmul.h); panels in groups of at most 512 KiB,
//          so that the group stays in L2 (1.25 to 2 MiB) while every row block passes over it once,
//          and the activations are read from beyond L2 once a group instead of once a panel.
//          Row-major weights become panels in a thread-local scratch as each group starts; with few
//          rows (below kPackRows) that would cost more than the product, and rows are dotted
//          directly.
// Cost:    2*M*N*K operations; below about 20 rows bound by reading w (N*K bytes or half).
// Numerics: exact; the same bits for every instruction set, layout, thread count and batch size.
// Edges:   M, N or K = 0; K not a multiple of 4 and groups that start inside a quad: the
//          activations are copied with zeros around each group, which leaves the weight layout as
//          it is. K > 65536: several tile calls added up.
// Limits:  K <= 131071, with multipliers 38342 (checked by the binding).
// Tests:   tests/kernels/test_matmul_native.py, test_linear_native.py,
//          test_integer_groups_native.py
#pragma once

#include <cstdint>
#include <vector>

#include "int_matmul.h"
#include "quantized_matmul_tile.h"
#include "repack.h"

namespace llmqat::cpu {

inline constexpr int64_t kMaxK = 131071;  // 131071 * 127 * 127 < 2^31 (spec 7)
inline constexpr int64_t kPackRows = 8;
inline constexpr int64_t kCacheBytes = 512 << 10;

struct QuantizedProblem {
  const int8_t* a;
  const float* a_scale;  // unused for int32
  int64_t m, n, k;
  const void* w;  // the codes; for repacked layouts the panels behind the header
  Layout layout;
  const float* w_scale;  // unused for int32
  int64_t group_size;    // -1: per channel
  const float* bias;     // or nullptr
  OutType out_type;
  void* y;
  const uint8_t* w_multiplier = nullptr;  // integer scales of the groups; w_scale is then [N]
};

class QuantizedMatmul {
 public:
  // Prepares the activations (row sums, padded copy); the pointers of the problem must outlive the
  // object.
  explicit QuantizedMatmul(const QuantizedProblem& problem);

  int64_t panels() const { return ceil_div(p_.n, kPanelChannels); }

  // Computes y[row_begin:row_end, 32 * panel_begin : 32 * panel_end]. Safe to call from several
  // threads.
  void run(int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) const;

 private:
  // A run of quads of one group: one tile call.
  struct Segment {
    int64_t a_offset;  // bytes into an activation row
    int64_t quad;      // first quad in the panel
    int64_t quads;
    int64_t group;
    bool first;  // of its group
  };
  struct Block;   // rows and panels of one tile
  struct Scales;  // of the channels of some panels

  void make_segments(bool copied);
  void copy_activations();
  void split_even_odd();
  void make_row_starts();
  void accumulate(const Block& block, int64_t group, int32_t* acc) const;
  void run_block(const Block& block, const Scales& scales) const;
  void sum_groups(const Block& block, const Scales& scales, float* sums) const;
  Scales gather_scales(int64_t panel, int64_t count) const;

  QuantizedProblem p_;
  Isa isa_;
  const IntKernels& kernels_;
  const TileEnd& end_;
  bool dot_;  // row-major weights used in place
  int64_t groups_;
  int64_t group_k_;  // K of one group
  std::vector<Segment> segments_;
  std::vector<int64_t> first_segment_;  // by group, one past the end at the end
  std::vector<int32_t> row_start_;      // [groups, m]: -offset * row sum
  std::vector<int8_t> copy_;
  const int8_t* a_;
  int64_t lda_;
};

}  // namespace llmqat::cpu
