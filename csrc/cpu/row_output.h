// Where a producer of rows puts them: as floats, as codes with a scale a row, or both.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace llmqat::cpu {

template <class T>
struct RowOutput {
  T* y;           // [rows, n], or nullptr
  int8_t* codes;  // [rows, n], with scale
  float* scale;   // [rows], or nullptr: no codes are wanted
  int bits;
};

// Runs make_row(r, y) for each row and quantizes y where codes are wanted; y lies in the output, or
// in memory of the thread where only codes are.
template <class T, class MakeRow>
void produce_rows(const Parallel& parallel, const RowOutput<T>& out, int64_t rows, int64_t n,
                  const MakeRow& make_row) {
  parallel.rows(rows, n * 3 * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    thread_local Scratch<T> t_row;  // here: a thread makes its own when it comes by
    const bool keeps = out.y != nullptr;
    T* buffer = keeps ? nullptr : t_row.get(n);
    for (int64_t r = begin; r < end; ++r) {
      T* y = keeps ? out.y + r * n : buffer;
      make_row(r, y);
      if (out.scale != nullptr) {
        out.scale[r] = quantize_row(y, n, out.bits, false, out.codes + r * n);
      }
    }
  });
}

}  // namespace llmqat::cpu
