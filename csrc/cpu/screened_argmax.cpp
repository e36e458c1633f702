// See screened_argmax.h.
#include "cpu/screened_argmax.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/float_matmul.h"
#include "cpu/matmul_cuts.h"
#include "cpu/quantized_matmul.h"
#include "cpu/rows.h"
#include "cpu/sampling.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace llmqat::cpu {
namespace {

constexpr int64_t kScreenGroup = 64;
constexpr int64_t kRowsPerPass = kMaxTileRows / 2;
constexpr double kUnit = 0x1p-24;
constexpr double kRaise = 1.0 + 0x1p-18;
constexpr float kUnderflow = 0x1p-80f;
constexpr double kLargest = 0x1p126;  // no sum in fp32 passes it where products of norms do not

// One hidden row and the approximation of its logits.
struct ScreenRow {
  const float* high;  // [n]: the products of the two parts
  const float* low;
  const float* row_norms;
  const float* error_norms;
  float a, b, c;
};

struct GroupBound {
  float upper, lower;  // largest approx + bound, largest approx - bound
  float size;          // largest |w| + |d|
  bool finite;         // every bound is
};

}  // namespace
}  // namespace llmqat::cpu

#define LLMQAT_KERNEL "cpu/screened_argmax_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {
namespace {

thread_local Scratch<float> t_hidden, t_rest, t_approx;
thread_local Scratch<int8_t> t_codes;
thread_local Scratch<GroupBound> t_groups;
thread_local Scratch<float> t_logits, t_maxima;

void bound_groups(const ScreenRow& row, int64_t n, int64_t begin, int64_t end, GroupBound* out) {
  LLMQAT_DISPATCH_ISA(bound_groups(row, n, begin, end, out))
}

// A hidden row as two rows of codes, and the coefficients of its bound.
struct Split {
  double a, b;
  double size;  // |x| + |X1| + |X2|; NaN if x has NaN or Inf
};

Split split_row(const float* x, int64_t k, float* rest, int8_t* codes, float* scale) {
  scale[0] = quantize_row(x, k, kMaxBits, false, codes);
  for (int64_t i = 0; i < k; ++i) rest[i] = x[i] - scale[0] * static_cast<float>(codes[i]);
  scale[1] = quantize_row(rest, k, kMaxBits, false, codes + k);
  const double s1 = scale[0], s2 = scale[1];
  double whole = 0, first = 0, second = 0, both = 0, left = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double high = s1 * codes[i], low = s2 * codes[k + i];
    const double r = x[i] - (high + low);
    whole += static_cast<double>(x[i]) * x[i];
    first += high * high;
    second += low * low;
    both += (high + low) * (high + low);
    left += r * r;
  }
  const double norm = std::sqrt(whole), parts = std::sqrt(first) + std::sqrt(second);
  const double roundings = kUnit * static_cast<double>(std::min(k, kSumK) + ceil_div(k, kSumK));
  const double gamma = roundings / (1.0 - roundings);
  const double slack = 16 * kUnit * parts;
  // 2^-40: r itself was rounded, in fp64.
  return {(std::sqrt(left) + (gamma + 0x1p-40) * norm + slack) * kRaise,
          (std::sqrt(both) + slack) * kRaise, norm + parts};
}

// A value v' <= v such that everything below v' has, in dtype T, a smaller value than v has; NaN if
// there is none.
template <class T>
float lowest_tie(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    T rounded = from_float<T>(v);
    if (!std::isfinite(to_float(rounded))) return std::numeric_limits<float>::quiet_NaN();
    const bool negative = (rounded.bits & 0x8000) != 0, zero = (rounded.bits & 0x7FFF) == 0;
    rounded.bits = static_cast<uint16_t>(zero       ? 0x8001
                                         : negative ? rounded.bits + 1
                                                    : rounded.bits - 1);
    return to_float(rounded);
  }
}

// The rows that may hold the largest logit, ascending; false if the bounds say nothing.
template <class T>
bool find_candidates(const Parallel& parallel, const ScreenRow& row, int64_t n, double size,
                     std::vector<int64_t>& found) {
  const int64_t groups = ceil_div(n, kScreenGroup);
  GroupBound* bounds = t_groups.get(groups);
  parallel.rows(groups, 4 * kScreenGroup * static_cast<int64_t>(sizeof(float)),
                [&](int64_t begin, int64_t end) { bound_groups(row, n, begin, end, bounds); });
  float bar = -std::numeric_limits<float>::infinity(), largest = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    if (!bounds[g].finite) return false;
    bar = std::max(bar, bounds[g].lower);
    largest = std::max(largest, bounds[g].size);
  }
  if (!(size * largest < kLargest)) return false;
  bar = lowest_tie<T>(bar);
  if (std::isnan(bar)) return false;
  found.clear();
  for (int64_t g = 0; g < groups; ++g) {
    if (bounds[g].upper < bar) continue;
    const int64_t end = std::min(n, (g + 1) * kScreenGroup);
    for (int64_t v = g * kScreenGroup; v < end; ++v) {
      const float bound = row.a * row.row_norms[v] + row.b * row.error_norms[v] + row.c;
      if (!(row.high[v] + row.low[v] + bound < bar)) found.push_back(v);
    }
  }
  return true;
}

struct PanelRun {
  int64_t begin, end;
};

// The panels of ascending channels, neighbours merged; returns how many panels they are.
int64_t merge_panels(const std::vector<int64_t>& channels, std::vector<PanelRun>& runs) {
  int64_t count = 0;
  runs.clear();
  for (const int64_t channel : channels) {
    const int64_t panel = channel / kFloatPanel;
    if (!runs.empty() && panel < runs.back().end) continue;
    ++count;
    if (!runs.empty() && panel == runs.back().end) {
      ++runs.back().end;
    } else {
      runs.push_back({panel, panel + 1});
    }
  }
  return count;
}

// The logits of one row, computed where they are asked for.
template <class T>
class Logits {
 public:
  Logits(const Parallel& parallel, const ScreenedHead& head, const float* x, T* out)
      : parallel_(parallel),
        n_(head.n),
        panel_bytes_(panel_bytes(head.layout, head.k)),
        out_(out),
        matmul_({.x = x,
                 .m = 1,
                 .n = head.n,
                 .k = head.k,
                 .w = head.head,
                 .layout = head.layout,
                 .bias = nullptr,
                 .out_type = out_type_of<T>(),
                 .y = out}) {}

  // -1 where the full product has to decide.
  int64_t best(const std::vector<int64_t>& candidates) const {
    thread_local std::vector<PanelRun> t_runs;
    std::vector<PanelRun>& runs = t_runs;
    if (2 * merge_panels(candidates, runs) > matmul_.panels()) return -1;
    parallel_.rows(static_cast<int64_t>(runs.size()), panel_bytes_,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i)
                       matmul_.run(runs[i].begin, runs[i].end, 0, 1);
                   });
    int64_t token = candidates.front();
    for (const int64_t v : candidates) {
      if (to_float(out_[v]) > to_float(out_[token])) token = v;
    }
    return std::isfinite(to_float(out_[token])) ? token : -1;
  }

  int64_t best_of_all() const {
    run_parallel(parallel_, matmul_, 1, panel_bytes_);
    const SampleRow greedy{
        .record = 0, .step = 0, .seed = 0, .temperature = 1.0f, .top_k = 0, .greedy = true};
    return sample_row(out_, n_, greedy, t_maxima.get(sample_scratch(n_)));
  }

 private:
  const Parallel& parallel_;
  int64_t n_, panel_bytes_;
  T* out_;
  FloatMatmul matmul_;
};

}  // namespace

template <class T>
void screened_argmax(const Parallel& parallel, const ScreenedHead& head, const T* hidden,
                     int64_t rows, int64_t* tokens, int64_t* candidates) {
  const int64_t n = head.n, k = head.k;
  if (n == 0) {
    std::fill(tokens, tokens + rows, -1);
    std::fill(candidates, candidates + rows, 0);
    return;
  }
  const int64_t most = std::min(rows, kRowsPerPass);
  float* x = t_hidden.get(std::max<int64_t>(1, most * k));
  float* rest = t_rest.get(std::max<int64_t>(1, k));
  int8_t* codes = t_codes.get(std::max<int64_t>(1, 2 * most * k));
  float* approx = t_approx.get(2 * most * n);
  T* logits = reinterpret_cast<T*>(t_logits.get(n));
  thread_local std::vector<int64_t> t_found;
  std::vector<int64_t>& found = t_found;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = std::min(most, rows - row);
    float scale[kMaxTileRows];
    Split splits[kRowsPerPass];
    for (int64_t r = 0; r < count; ++r) {
      float* to = x + r * k;
      for (int64_t i = 0; i < k; ++i) to[i] = to_float(hidden[(row + r) * k + i]);
      splits[r] = split_row(to, k, rest, codes + 2 * r * k, scale + 2 * r);
    }
    const QuantizedMatmul matmul({codes, scale, 2 * count, n, k, head.screen, Layout::panels8,
                                  head.scale, -1, nullptr, OutType::float32, approx});
    run_parallel(parallel, matmul, 2 * count, panel_bytes(Layout::panels8, k));
    for (int64_t r = 0; r < count; ++r) {
      const ScreenRow screened{
          approx + 2 * r * n, approx + (2 * r + 1) * n,        head.row_norms,
          head.error_norms,   static_cast<float>(splits[r].a), static_cast<float>(splits[r].b),
          kUnderflow};
      const Logits<T> exact(parallel, head, x + r * k, logits);
      int64_t token = -1;
      if (find_candidates<T>(parallel, screened, n, splits[r].size, found)) {
        token = exact.best(found);
      }
      candidates[row + r] = token < 0 ? n : static_cast<int64_t>(found.size());
      tokens[row + r] = token < 0 ? exact.best_of_all() : token;
    }
  }
}

#define LLMQAT_INSTANTIATE(T)                                                               \
  template void screened_argmax<T>(const Parallel&, const ScreenedHead&, const T*, int64_t, \
                                   int64_t*, int64_t*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
