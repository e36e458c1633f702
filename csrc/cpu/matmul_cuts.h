// How the two matmul drivers cut their rows and panels, and the threads that run them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "repack.h"

namespace llmqat::cpu {

// Four tiles: enough to pay for a second pass over the weights.
inline constexpr int64_t kRowsPerPart = 48;

// [begin, end) in the fewest parts of at most `most`, equal to within one: 16 rows become 8 + 8
// rather than 12 + 4, and every tile has enough accumulators to hide latency.
struct Cut {
  int64_t begin, end, parts;
  Cut(int64_t begin, int64_t end, int64_t most)
      : begin(begin), end(end), parts((end - begin + most - 1) / most) {}
  int64_t at(int64_t i) const { return begin + (end - begin) * i / parts; }
};

// All panels and rows of a matmul: by panels, and by rows, too, where panels are few.
template <class Matmul>
void run_parallel(const Parallel& parallel, const Matmul& matmul, int64_t rows,
                  int64_t panel_bytes) {
  const int64_t panels = matmul.panels();
  if (panels == 0 || rows == 0) return;
  const int64_t tasks = 2 * parallel.threads();
  int64_t parts = 1;
  if (panels < tasks) {
    parts = std::max<int64_t>(1, std::min(ceil_div(tasks, panels), rows / kRowsPerPart));
  }
  // 8 rows take about the time of one read.
  const int64_t row_work = std::max<int64_t>(1, rows / parts / 8);
  parallel.rows(panels * parts, panel_bytes * row_work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t part = begin / panels, first = begin % panels;
      const int64_t last = std::min(panels, first + end - begin);
      matmul.run(first, last, rows * part / parts, rows * (part + 1) / parts);
      begin += last - first;
    }
  });
}

}  // namespace llmqat::cpu
