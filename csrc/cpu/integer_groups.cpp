// See integer_groups.h.
#include "integer_groups.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "llmqat/quant_math.h"
#include "rows.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

thread_local Scratch<float> t_fine;

// The groups' own scales, 0 for a group of zeros; returns the largest, or NaN for a row that is not
// finite.
template <class T>
float fine_scales(const T* x, int64_t groups, int64_t n, int bits, float* fine) {
  float top = 0.0f;
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g) {
    const RowScale group = row_scale(amax_bits_of_row(x + g * n, n), bits, false);
    finite = finite && group.scale == group.scale;
    fine[g] = group.zero ? 0.0f : group.scale;
    top = std::max(top, fine[g]);
  }
  return finite ? top : bits_float(0x7FC00000u);
}

template <class T>
float quantize_row(const T* x, int64_t groups, int64_t n, int bits, int8_t* codes,
                   uint8_t* multiplier) {
  float* fine = t_fine.get(std::max<int64_t>(1, groups));
  const float top = fine_scales(x, groups, n, bits, fine);
  if (!(top > 0.0f)) {
    std::fill_n(multiplier, groups, uint8_t{1});
    std::fill_n(codes, groups * n, int8_t{0});
    return top == 0.0f ? 1.0f : top;
  }
  constexpr float kLargest = kMaxMultiplier;
  const float scale = round_to<bf16>(div_rn(top, kLargest));
  for (int64_t g = 0; g < groups; ++g) {
    const float steps = std::clamp(div_rn(fine[g], scale), 1.0f, kLargest);
    const float m = std::ceil(steps);
    multiplier[g] = static_cast<uint8_t>(m);
    int8_t* to = codes + g * n;
    if (fine[g] == 0.0f) {
      std::fill_n(to, n, int8_t{0});
    } else {
      codes_of_row(x + g * n, n, div_rn(1.0f, mul_rn(m, scale)), bits, to);
    }
  }
  return scale;
}

}  // namespace

template <class T>
void quantize_integer_groups(const Parallel& parallel, const T* x, int64_t rows, int64_t groups,
                             int64_t n, int bits, int8_t* codes, uint8_t* multiplier,
                             float* scale) {
  const int64_t columns = groups * n;
  parallel.rows(rows, columns * static_cast<int64_t>(sizeof(T) + 1),
                [&](int64_t begin, int64_t end) {
                  for (int64_t r = begin; r < end; ++r) {
                    scale[r] = quantize_row(x + r * columns, groups, n, bits, codes + r * columns,
                                            multiplier + r * groups);
                  }
                });
}

#define LLMQAT_INSTANTIATE(T)                                                                    \
  template void quantize_integer_groups<T>(const Parallel&, const T*, int64_t, int64_t, int64_t, \
                                           int, int8_t*, uint8_t*, float*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
