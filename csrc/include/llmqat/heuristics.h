// How operators cut their work: pure host functions, shared by launchers, bindings and Python.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llmqat {

// About 64 KiB of traffic a CPU task: waking a thread costs some microseconds, which is what one
// core needs to move that much.
inline constexpr int64_t kBytesPerTask = 65536;

inline int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
}

// CUDA quantize: one block a row; as many whole warps as there are vector loads in the row, from 1
// to 8 (8 warps x 8 blocks fill an SM's 64 warp slots; wider rows loop).
inline int64_t quantize_threads(int64_t columns, int64_t vector) {
  const int64_t loads = (columns + vector - 1) / std::max<int64_t>(1, vector);
  const int64_t warps = std::clamp<int64_t>((loads + 31) / 32, 1, 8);
  return warps * 32;
}

}  // namespace llmqat
