// See quantized_matmul.h.
#include "quantized_matmul.h"

#include <algorithm>
#include <cstring>

#include "matmul_cuts.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

thread_local Scratch<uint8_t> t_panels;
thread_local Scratch<float> t_scales;
thread_local Scratch<int32_t> t_multipliers;

constexpr int32_t kZeros[kMaxTileRows] = {};

bool is_row_major(Layout layout) { return layout == Layout::codes || layout == Layout::nibbles; }

}  // namespace

struct QuantizedMatmul::Block {
  int64_t row;
  int rows;
  int64_t panel;  // index of the first panel
  int panels;
  const uint8_t* weights;  // its first byte (row-major: the first row)
};

// By channel: one row, or a row of `stride` for each group.
struct QuantizedMatmul::Scales {
  const float* scale;
  const int32_t* multiplier;  // or nullptr
  int64_t stride;

  Scales from(int64_t channel) const {
    return {scale == nullptr ? nullptr : scale + channel,
            multiplier == nullptr ? nullptr : multiplier + channel, stride};
  }
};

QuantizedMatmul::QuantizedMatmul(const QuantizedProblem& problem)
    : p_(problem),
      isa_(current_isa()),
      kernels_(int_kernels(isa_)),
      end_(tile_end(isa_)),
      groups_(problem.group_size == -1 ? 1 : problem.k / problem.group_size),
      group_k_(problem.group_size == -1 ? problem.k : problem.group_size),
      a_(problem.a),
      lda_(problem.k) {
  const bool nibbles = p_.layout == Layout::nibbles;
  dot_ = is_row_major(p_.layout) && kernels_.dot8 != nullptr && p_.m < kPackRows &&
         !(nibbles && p_.group_size != -1 && p_.group_size % 2 != 0);
  if (dot_) {
    if (nibbles) split_even_odd();
  } else {
    const bool inside_quad = p_.k % kQuad != 0 || group_k_ % kQuad != 0;
    // Rows a multiple of 1 KiB apart fall into the same few cache sets.
    const bool conflicts = p_.m >= kPackRows && p_.k % 1024 == 0;
    make_segments(inside_quad || conflicts);
    if (inside_quad || conflicts) copy_activations();
  }
  make_row_starts();
}

void QuantizedMatmul::make_segments(bool copied) {
  int64_t copy_offset = 0;
  for (int64_t g = 0; g < groups_; ++g) {
    first_segment_.push_back(static_cast<int64_t>(segments_.size()));
    const int64_t begin = g * group_k_ / kQuad, end = ceil_div((g + 1) * group_k_, kQuad);
    for (int64_t quad = begin; quad < end || quad == begin; quad += kMaxTileK / kQuad) {
      const int64_t quads = std::min(kMaxTileK / kQuad, end - quad);
      segments_.push_back({copied ? copy_offset : quad * kQuad, quad, quads, g, quad == begin});
      copy_offset += quads * kQuad;
    }
  }
  first_segment_.push_back(static_cast<int64_t>(segments_.size()));
  if (copied)
    lda_ = ((copy_offset / 64 + 1) | 1) * 64;  // an odd number of cache lines: no set conflicts
}

void QuantizedMatmul::copy_activations() {
  copy_.resize(static_cast<size_t>(p_.m * lda_));
  for (int64_t m = 0; m < p_.m; ++m) {
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t lead =
          g * group_k_ % kQuad;  // columns of the quad that belong to the group before
      const int64_t offset = segments_[first_segment_[g]].a_offset;
      std::memcpy(&copy_[m * lda_ + offset + lead], p_.a + m * p_.k + g * group_k_, group_k_);
    }
  }
  a_ = copy_.data();
}

void QuantizedMatmul::split_even_odd() {
  const int64_t half = ceil_div(p_.k, 2);
  lda_ = 2 * half;
  copy_.resize(static_cast<size_t>(p_.m * lda_));
  for (int64_t m = 0; m < p_.m; ++m) {
    int8_t* to = copy_.data() + m * lda_;
    for (int64_t k = 0; k < p_.k; ++k) to[(k % 2) * half + k / 2] = p_.a[m * p_.k + k];
  }
  a_ = copy_.data();
}

void QuantizedMatmul::make_row_starts() {
  const bool int4 = p_.layout == Layout::panels4 || (dot_ && p_.layout == Layout::nibbles);
  const int32_t offset = int4 ? 8 : 128;
  row_start_.resize(static_cast<size_t>(groups_ * p_.m));
  for (int64_t m = 0; m < p_.m; ++m) {
    for (int64_t g = 0; g < groups_; ++g) {
      row_start_[g * p_.m + m] = -offset * kernels_.sum(p_.a + m * p_.k + g * group_k_, group_k_);
    }
  }
}

void QuantizedMatmul::accumulate(const Block& b, int64_t group, int32_t* acc) const {
  const int32_t* start = row_start_.data() + group * p_.m + b.row;
  const int64_t ld = static_cast<int64_t>(b.panels) * kPanelChannels;
  if (dot_) {
    const bool nibbles = p_.layout == Layout::nibbles;
    const int64_t at = nibbles ? group * group_k_ / 2 : group * group_k_;
    const int64_t bytes = nibbles ? ceil_div(group_k_, 2) : group_k_;
    const int64_t ldw = nibbles ? ceil_div(p_.k, 2) : p_.k;
    const int channels =
        static_cast<int>(std::min<int64_t>(kPanelChannels, p_.n - b.panel * kPanelChannels));
    const DotArgs args{
        a_ + b.row * lda_ + at, lda_, lda_ / 2, b.weights + at, ldw, bytes, start, acc, ld};
    return (nibbles ? kernels_.dot4 : kernels_.dot8)(b.rows, channels, args);
  }
  const bool int4 = p_.layout == Layout::panels4;
  for (int64_t i = first_segment_[group]; i < first_segment_[group + 1]; ++i) {
    const Segment& s = segments_[i];
    const uint8_t* panel = b.weights + s.quad * (int4 ? kQuadBytes4 : kQuadBytes8);
    const TileArgs args{a_ + b.row * lda_ + s.a_offset,
                        lda_,
                        panel,
                        panel_bytes(p_.layout, p_.k),
                        s.quads,
                        s.first ? start : kZeros,
                        acc,
                        ld,
                        !s.first};
    (int4 ? kernels_.tile4 : kernels_.tile8)(b.rows, b.panels, args);
  }
}

// The sums of all groups, scaled: what is left is the bias and the cast.
void QuantizedMatmul::sum_groups(const Block& b, const Scales& s, float* sums) const {
  alignas(64) int32_t acc[kMaxTileCells];
  alignas(64) int32_t total[kMaxTileCells];
  const int64_t ld = static_cast<int64_t>(b.panels) * kPanelChannels;
  const int cols = static_cast<int>(std::min(ld, p_.n - b.panel * kPanelChannels));
  const float* sx = p_.a_scale + b.row;
  if (groups_ == 0) {
    std::fill_n(sums, b.rows * ld, 0.0f);
    std::fill_n(total, b.rows * ld, 0);
  }
  for (int64_t g = 0; g < groups_; ++g) {
    accumulate(b, g, acc);
    if (s.multiplier == nullptr) {
      end_.scale(acc, ld, b.rows, cols, sx, s.scale + g * s.stride, g == 0, sums);
    } else {
      end_.weigh(acc, ld, b.rows, cols, s.multiplier + g * s.stride, g == 0, total);
    }
  }
  if (s.multiplier != nullptr) end_.scale(total, ld, b.rows, cols, sx, s.scale, true, sums);
}

// scales: those of the block's first channel on.
void QuantizedMatmul::run_block(const Block& b, const Scales& scales) const {
  const int64_t channel = b.panel * kPanelChannels,
                ld = static_cast<int64_t>(b.panels) * kPanelChannels;
  const int cols = static_cast<int>(std::min(ld, p_.n - channel));
  char* y = static_cast<char*>(p_.y) + (b.row * p_.n + channel) * out_bytes(p_.out_type);
  if (p_.out_type == OutType::int32) {
    alignas(64) int32_t acc[kMaxTileCells];
    accumulate(b, 0, acc);
    for (int r = 0; r < b.rows; ++r) std::memcpy(y + r * p_.n * 4, acc + r * ld, cols * 4);
    return;
  }
  alignas(64) float sums[kMaxTileCells];
  sum_groups(b, scales, sums);
  const float* bias = p_.bias == nullptr ? nullptr : p_.bias + channel;
  end_.store(sums, ld, b.rows, cols, bias, p_.out_type, y, p_.n);
}

// Those of count panels from `panel` on; what belongs to groups in rows by group.
QuantizedMatmul::Scales QuantizedMatmul::gather_scales(int64_t panel, int64_t count) const {
  const int64_t channel = panel * kPanelChannels;
  const float* scale = p_.w_scale == nullptr ? nullptr : p_.w_scale + channel;
  if (p_.group_size == -1 || p_.out_type == OutType::int32) return {scale, nullptr, 0};
  const int64_t stride = count * kPanelChannels, cells = std::max<int64_t>(1, groups_ * stride);
  const int64_t channels = std::min(stride, p_.n - channel), at = channel * groups_;
  if (p_.w_multiplier != nullptr) {
    int32_t* out = t_multipliers.get(cells);
    multipliers_by_group(p_.w_multiplier + at, groups_, channels, out, stride);
    return {scale, out, stride};
  }
  float* out = t_scales.get(cells);
  scales_by_group(p_.w_scale + at, groups_, channels, out, stride);
  return {out, nullptr, stride};
}

void QuantizedMatmul::run(int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                          int64_t row_end) const {
  if (panel_begin >= panel_end || row_begin >= row_end) return;
  const Cut row_cut(row_begin, row_end, dot_ ? 4 : kernels_.max_rows);
  const int tile_panels =
      dot_ ? 1
           : kernels_.tile_panels(static_cast<int>(ceil_div(row_end - row_begin, row_cut.parts)));
  const bool pack = is_row_major(p_.layout) && !dot_;
  const int64_t bytes = panel_bytes(p_.layout, p_.k);
  const int64_t row_bytes = p_.layout == Layout::nibbles ? ceil_div(p_.k, 2) : p_.k;

  int64_t in_cache = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, bytes));
  in_cache = std::max<int64_t>(tile_panels, in_cache / tile_panels * tile_panels);
  if (row_cut.parts == 1) in_cache = tile_panels;  // nothing is read twice
  for (int64_t group = panel_begin; group < panel_end; group += in_cache) {
    const int64_t count = std::min(in_cache, panel_end - group);
    const uint8_t* weights = static_cast<const uint8_t*>(p_.w);
    if (pack) {
      uint8_t* packed = t_panels.get(std::max<int64_t>(1, count * bytes));
      for (int64_t i = 0; i < count; ++i)
        pack_panel8(isa_, p_.w, p_.layout, p_.n, p_.k, group + i, packed + i * bytes);
      weights = packed;
    } else {
      weights += dot_ ? group * kPanelChannels * row_bytes : group * bytes;
    }
    const int64_t stride_bytes = dot_ ? kPanelChannels * row_bytes : bytes;
    const Scales scales = gather_scales(group, count);
    const Cut panel_cut(0, count, tile_panels);
    for (int64_t r = 0; r < row_cut.parts; ++r) {
      const int64_t row = row_cut.at(r);
      for (int64_t c = 0; c < panel_cut.parts; ++c) {
        const int64_t panel = panel_cut.at(c);
        const Block block{row, static_cast<int>(row_cut.at(r + 1) - row), group + panel,
                          static_cast<int>(panel_cut.at(c + 1) - panel),
                          weights + panel * stride_bytes};
        run_block(block, scales.from(panel * kPanelChannels));
      }
    }
  }
}

}  // namespace llmqat::cpu
