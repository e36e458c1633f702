// fake_quantize_channels: one scale per group of columns, over all rows.
//
// Math:     spec 24 (2 to 5 on the elements of a group).
// Shapes:   x, y [rows, columns]; one scale per `group` columns.
// Dtypes:   fp32, bf16, fp16 in and out; fp32 arithmetic and scales.
// Tiling:   pass 1 in blocks of kBlock columns, so that threads share no maximum and a block of a
//           row is still several cache lines; pass 2 in rows. Between them scale and inverse are
//           spread over the columns: 8 bytes a column, and no group's length matters to pass 2.
// Cost:     memory-bound: x is read twice and y written once, 3 * sizeof(T) a value.
// Numerics: exact. The maximum is one of integers (magnitude.h). No FMA.
// Edges:    a group without codes has inverse 0: its codes are 0, and 0 * NaN is NaN.
// Limits:   MXCSR at its default.
// Tests:    tests/kernels/test_fake_quantize_channels.py
// Bench:    python -m benchmarks.run --op fake_quantize_channels
#include "cpu/channels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/magnitude.h"
#include "cpu/simd.h"

namespace llmqat::cpu {
namespace {

constexpr int64_t kBlock = 128;

template <class T>
using Magnitude = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint16_t>;

}  // namespace
}  // namespace llmqat::cpu

#define LLMQAT_KERNEL "cpu/channels_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {
namespace {

template <class T>
void raise_row(const T* x, int64_t n, Magnitude<T>* top) {
  LLMQAT_DISPATCH_ISA(raise_magnitudes(x, n, top))
}

template <class T>
void fake_quantize_row_of_columns(const T* x, const float* inv, const float* scale, int64_t n,
                                  float limit, T* y) {
  LLMQAT_DISPATCH_ISA(fake_quantize_columns(x, inv, scale, n, limit, y))
}

}  // namespace

template <class T>
void fake_quantize_channels(const Parallel& parallel, const T* x, int64_t rows, int64_t columns,
                            int64_t group, int bits, T* y) {
  std::vector<Magnitude<T>> top(static_cast<size_t>(columns), 0);
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const int64_t value_bytes = static_cast<int64_t>(sizeof(T));
  parallel.rows(blocks, rows * kBlock * value_bytes, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, n = std::min(end * kBlock, columns) - first;
    for (int64_t r = 0; r < rows; ++r) raise_row(x + r * columns + first, n, top.data() + first);
  });

  std::vector<float> inv(static_cast<size_t>(columns)), scale(static_cast<size_t>(columns));
  for (int64_t c = 0; c < columns; c += group) {
    const Magnitude<T> amax = *std::max_element(top.data() + c, top.data() + c + group);
    const RowScale row = row_scale(widen_amax(amax, x), bits, false);
    std::fill_n(inv.data() + c, group, row.inv);
    std::fill_n(scale.data() + c, group, row.scale);
  }

  const float limit = static_cast<float>(qmax(bits));
  parallel.rows(rows, 2 * columns * value_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      fake_quantize_row_of_columns(x + r * columns, inv.data(), scale.data(), columns, limit,
                                   y + r * columns);
    }
  });
}

#define LLMQAT_INSTANTIATE(T)                                                                   \
  template void fake_quantize_channels<T>(const Parallel&, const T*, int64_t, int64_t, int64_t, \
                                          int, T*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
