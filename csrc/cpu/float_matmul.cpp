// The driver and the scalar tiles of float_matmul.h.
#include "float_matmul.h"

#include <algorithm>
#include <cmath>

#include "llmqat/quant_math.h"
#include "matmul_cuts.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

constexpr int64_t kSliceK = 1024;           // 2 panels of a slice are 128 KiB: far below L2
static_assert(kSliceK % kSumK == 0);        // a slice never cuts a block of the sum
constexpr int64_t kSliceRows = 512;         // partial sums of a group: 512 x 128 fp32 = 256 KiB
constexpr int64_t kGroupBytes = 512 << 10;  // weights of a group and slice
constexpr int64_t kGroupPanels = 8;

thread_local Scratch<float> t_partial;
thread_local Scratch<float> t_weights;

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

FloatMatmul::FloatMatmul(const FloatProblem& problem)
    : p_(problem),
      isa_(current_isa()),
      kernels_(float_kernels(isa_)),
      end_(tile_end(isa_)),
      bf16_(problem.layout == Layout::panels_bf16) {}

void FloatMatmul::dequantize(int64_t panel, float* out) const {
  const auto call = [&](auto t) {
    dequantize_panel<decltype(t)>(p_.w, p_.layout, p_.n, p_.k, p_.w_scale, p_.group_size, panel,
                                  out);
  };
  switch (p_.round) {
    case RoundTo::bfloat16: return call(bf16{});
    case RoundTo::float16: return call(fp16{});
    default: return call(float{});
  }
}

// count panels starting at `panels`, which is panel first_panel of the weight.
void FloatMatmul::run_group(const void* panels, int64_t first_panel, int64_t count,
                            int64_t row_begin, int64_t row_end, const char* ahead,
                            const char* ahead_end) const {
  const Cut rows(row_begin, row_end, kernels_.max_rows);
  // One row block reads each weight once: nothing to keep in cache, so no slices.
  const int64_t slice = rows.parts == 1 ? std::max<int64_t>(1, p_.k) : kSliceK;
  const int64_t ld = count * kFloatPanel;
  float* partial = t_partial.get((row_end - row_begin) * ld);
  const int64_t most =
      kernels_.tile_panels(static_cast<int>(ceil_div(row_end - row_begin, rows.parts)));
  for (int64_t k = 0; k == 0 || k < p_.k; k += slice) {
    for (int64_t b = 0; b < rows.parts; ++b) {
      const int64_t row = rows.at(b);
      const int block = static_cast<int>(rows.at(b + 1) - row);
      float* out = partial + (row - row_begin) * ld;
      for (int64_t p = 0, step = 0; p < count; p += step) {
        step = std::min(most, power_of_two_at_most(count - p));
        const int64_t first = p * p_.k * kFloatPanel + k * kFloatPanel;
        const char* w = static_cast<const char*>(panels) + first * (bf16_ ? 2 : 4);
        const FloatTileArgs args{
            p_.x + row * p_.k + k, p_.k, w,    p_.k * kFloatPanel, std::min(slice, p_.k - k), k > 0,
            out + p * kFloatPanel, ld,   ahead};
        (bf16_ ? kernels_.tile_bf16 : kernels_.tile_f32)(block, static_cast<int>(step), args);
        if (ahead != nullptr) ahead += args.k / 4 * 128;
        if (ahead >= ahead_end) ahead = nullptr;
      }
      if (k + slice < p_.k) continue;
      const int64_t channel = first_panel * kFloatPanel;
      end_.store(out, ld, block, static_cast<int>(std::min(ld, p_.n - channel)),
                 p_.bias == nullptr ? nullptr : p_.bias + channel, p_.out_type,
                 static_cast<char*>(p_.y) + (row * p_.n + channel) * out_bytes(p_.out_type), p_.n);
    }
  }
}

void FloatMatmul::run(int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                      int64_t row_end) const {
  const bool packed = p_.layout == Layout::panels_f32 || bf16_;
  const int64_t floats = p_.k * kFloatPanel;
  const int64_t element = bf16_ ? 2 : 4;
  for (int64_t panel = panel_begin; panel < panel_end;) {
    // A dequantized group is whole panels: as many as fit, at least the two of a full tile.
    const int64_t fit = std::max<int64_t>(2, kGroupBytes / std::max<int64_t>(1, floats * 4));
    const int64_t most = packed ? kGroupPanels : std::min(kGroupPanels, fit);
    const int64_t count = std::min(most, panel_end - panel);
    const void* weights = static_cast<const char*>(p_.w) + panel * floats * element;
    if (!packed) {
      float* out = t_weights.get(std::max<int64_t>(1, count * floats));
      for (int64_t i = 0; i < count; ++i) dequantize(panel + i, out + i * floats);
      weights = out;
    }
    // The next group comes from memory while this one is in cache.
    const char* next = static_cast<const char*>(weights) + count * floats * element;
    const int64_t next_bytes = std::min(count, panel_end - panel - count) * floats * element;
    for (int64_t row = row_begin; row < row_end; row += kSliceRows) {
      const bool fetch = packed && row == row_begin && next_bytes > 0;
      run_group(weights, panel, count, row, std::min(row_end, row + kSliceRows),
                fetch ? next : nullptr, next + next_bytes);
    }
    panel += count;
  }
}

}  // namespace llmqat::cpu
