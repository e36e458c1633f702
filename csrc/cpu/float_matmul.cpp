// The driver and the scalar tiles of float_matmul.h.
#include "float_matmul.h"

#include <algorithm>
#include <cmath>

#include "llmqat/quant_math.h"
#include "matmul_cuts.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

constexpr int64_t kSliceK = 1024;     // 2 panels of a slice are 128 KiB: far below L2
static_assert(kSliceK % kSumK == 0);  // a slice never cuts a block of the sum
constexpr int64_t kSliceRows = 512;   // partial sums of a group: 512 x 128 fp32 = 256 KiB
constexpr int64_t kGroupPanels = 8;   // 512 KiB of a slice

thread_local Scratch<float> t_partial;
thread_local Scratch<float> t_weights;
thread_local Scratch<float> t_scales;
thread_local Scratch<uint8_t> t_panels;

float widen(float v) { return v; }
float widen(uint16_t v) { return to_float(bf16{v}); }

template <class W>
void tile_scalar(int rows, int panels, const FloatTileArgs& t) {
  for (int r = 0; r < rows; ++r) {
    for (int p = 0; p < panels; ++p) {
      const W* w = static_cast<const W*>(t.panel) + p * t.panel_stride;
      float* out = t.out + r * t.ldo + p * kFloatPanel;
      for (int64_t begin = 0; begin == 0 || begin < t.k; begin += kSumK) {
        float sum[kFloatPanel] = {};
        const int64_t end = begin + block_length(t.k, begin);
        for (int64_t k = begin; k < end; ++k, w += kFloatPanel) {
          const float x = t.x[r * t.ldx + k];
          for (int i = 0; i < kFloatPanel; ++i) sum[i] = std::fma(x, widen(w[i]), sum[i]);
        }
        const bool resume = t.resume || begin > 0;
        for (int i = 0; i < kFloatPanel; ++i) out[i] = resume ? out[i] + sum[i] : sum[i];
      }
    }
  }
}

int one_panel(int) { return 1; }

constexpr FloatKernels kFloatKernelsScalar = {4, one_panel, tile_scalar<float>,
                                              tile_scalar<uint16_t>};

int64_t power_of_two_at_most(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

}  // namespace

const FloatKernels& float_kernels(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return kFloatKernelsAvx512;
    case Isa::avx2: return kFloatKernelsAvx2;
    default: return kFloatKernelsScalar;
  }
}

// Float panels [first, first + count) of the weight.
struct FloatMatmul::Group {
  int64_t first, count;
  const char* weights;  // nullptr: to be unpacked from codes
  CodePanels codes;
  const char* ahead;  // prefetched meanwhile, up to ahead_end
  const char* ahead_end;
};

FloatMatmul::FloatMatmul(const FloatProblem& problem)
    : p_(problem),
      isa_(current_isa()),
      kernels_(float_kernels(isa_)),
      code_kernels_(code_kernels(isa_)),
      end_(tile_end(isa_)),
      bf16_(problem.layout == Layout::panels_bf16),
      codes_(problem.layout != Layout::panels_f32 && !bf16_) {}

// count panels of codes from `panel` on; scales, and what was row-major, lie in scratch of this
// thread until the next call.
CodePanels FloatMatmul::codes(int64_t panel, int64_t count) const {
  const int64_t bytes = panel_bytes(p_.layout, p_.k);
  const int64_t groups = p_.k == 0 ? 0 : p_.k / p_.group_size;
  const int64_t channel = panel * kPanelChannels, ld = count * kPanelChannels;
  float* scales = t_scales.get(std::max<int64_t>(1, groups * ld));
  scales_by_group(p_.w_scale + channel * groups, groups, std::min(ld, p_.n - channel), scales, ld);
  CodePanels w{
      nullptr, bytes, scales, ld, std::max<int64_t>(1, p_.group_size), p_.layout == Layout::panels4,
      p_.round};
  if (p_.layout == Layout::panels4 || p_.layout == Layout::panels8) {
    w.first = static_cast<const uint8_t*>(p_.w) + panel * bytes;
  } else {
    uint8_t* packed = t_panels.get(std::max<int64_t>(1, count * bytes));
    for (int64_t i = 0; i < count; ++i)
      pack_panel8(isa_, p_.w, p_.layout, p_.n, p_.k, panel + i, packed + i * bytes);
    w.first = packed;
  }
  return w;
}

// k of [begin, end) of a group of codes as float panels [count][end - begin][16].
void FloatMatmul::unpack(const Group& group, int64_t begin, int64_t end, float* out) const {
  const int64_t floats = (end - begin) * kFloatPanel;
  CodePanels w = group.codes;
  for (int64_t p = 0; p < group.count; p += 2, w.first += w.stride, w.scale += kPanelChannels) {
    float* high = p + 1 < group.count ? out + (p + 1) * floats : nullptr;
    code_kernels_.unpack(w, begin, end, out + p * floats, high);
  }
}

void FloatMatmul::run_group(const Group& group, int64_t row_begin, int64_t row_end) const {
  const Cut rows(row_begin, row_end, kernels_.max_rows);
  // One row block reads each weight once: nothing to keep in cache, so no slices of stored panels.
  const bool whole = rows.parts == 1 && group.weights != nullptr;
  const int64_t slice = whole ? std::max<int64_t>(1, p_.k) : kSliceK;
  const int64_t ld = group.count * kFloatPanel;
  float* partial = t_partial.get((row_end - row_begin) * ld);
  const int64_t most =
      kernels_.tile_panels(static_cast<int>(ceil_div(row_end - row_begin, rows.parts)));
  const char* ahead = group.ahead;
  for (int64_t k = 0; k == 0 || k < p_.k; k += slice) {
    const int64_t length = std::min(slice, p_.k - k);
    const char* weights = group.weights;
    int64_t stride = p_.k * kFloatPanel, first = k * kFloatPanel;
    if (weights == nullptr) {
      stride = length * kFloatPanel, first = 0;
      float* out = t_weights.get(std::max<int64_t>(1, group.count * stride));
      unpack(group, k, k + length, out);
      weights = reinterpret_cast<const char*>(out);
    }
    for (int64_t b = 0; b < rows.parts; ++b) {
      const int64_t row = rows.at(b);
      const int block = static_cast<int>(rows.at(b + 1) - row);
      float* out = partial + (row - row_begin) * ld;
      for (int64_t p = 0, step = 0; p < group.count; p += step) {
        step = std::min(most, power_of_two_at_most(group.count - p));
        const char* w = weights + (p * stride + first) * (bf16_ ? 2 : 4);
        const FloatTileArgs args{p_.x + row * p_.k + k, p_.k, w,    stride, length, k > 0,
                                 out + p * kFloatPanel, ld,   ahead};
        (bf16_ ? kernels_.tile_bf16 : kernels_.tile_f32)(block, static_cast<int>(step), args);
        if (ahead != nullptr) ahead += args.k / 4 * 128;
        if (ahead >= group.ahead_end) ahead = nullptr;
      }
      if (k + slice < p_.k) continue;
      const int64_t channel = group.first * kFloatPanel;
      end_.store(out, ld, block, static_cast<int>(std::min(ld, p_.n - channel)),
                 p_.bias == nullptr ? nullptr : p_.bias + channel, p_.out_type,
                 static_cast<char*>(p_.y) + (row * p_.n + channel) * out_bytes(p_.out_type), p_.n);
    }
  }
}

// Panels of codes, unpacked in registers.
void FloatMatmul::run_few(int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                          int64_t row_end) const {
  alignas(64) float out[kMaxCodeCells];
  const int rows = static_cast<int>(row_end - row_begin);
  const int64_t most = code_kernels_.tile_panels(rows);
  for (int64_t panel = panel_begin, count = 0; panel < panel_end; panel += count) {
    count = std::min(most, power_of_two_at_most(panel_end - panel));
    const int64_t channel = panel * kPanelChannels, ld = count * kPanelChannels;
    code_kernels_.tile(rows, static_cast<int>(count),
                       {p_.x + row_begin * p_.k, p_.k, p_.k, codes(panel, count), out});
    end_.store(out, ld, rows, static_cast<int>(std::min(ld, p_.n - channel)),
               p_.bias == nullptr ? nullptr : p_.bias + channel, p_.out_type,
               static_cast<char*>(p_.y) + (row_begin * p_.n + channel) * out_bytes(p_.out_type),
               p_.n);
  }
}

void FloatMatmul::run(int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                      int64_t row_end) const {
  if (codes_ && row_end - row_begin <= code_kernels_.max_rows)
    return run_few(panel_begin, panel_end, row_begin, row_end);
  const int64_t halves = panel_channels(p_.layout) / kFloatPanel;  // float panels of one
  const int64_t floats = p_.k * kFloatPanel;
  const int64_t element = bf16_ ? 2 : 4;
  const int64_t end = std::min(panel_end * halves, ceil_div(p_.n, kFloatPanel));
  for (int64_t panel = panel_begin * halves; panel < end;) {
    const int64_t count = std::min(kGroupPanels, end - panel);
    Group group{panel, count, nullptr, {}, nullptr, nullptr};
    if (codes_) {
      group.codes = codes(panel / halves, ceil_div(count, halves));
    } else {
      group.weights = static_cast<const char*>(p_.w) + panel * floats * element;
    }
    // The next group comes from memory while this one is in cache.
    const char* next = codes_ ? nullptr : group.weights + count * floats * element;
    const int64_t next_bytes = std::min(count, end - panel - count) * floats * element;
    for (int64_t row = row_begin; row < row_end; row += kSliceRows) {
      const bool fetch = next != nullptr && row == row_begin && next_bytes > 0;
      group.ahead = fetch ? next : nullptr;
      group.ahead_end = fetch ? next + next_bytes : nullptr;
      run_group(group, row, std::min(row_end, row + kSliceRows));
    }
    panel += count;
  }
}

}  // namespace llmqat::cpu
