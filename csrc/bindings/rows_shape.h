// How the row operators cut a tensor into rows or groups; the same on every device.
#pragma once

#include <vector>

#include "checks.h"

namespace llmqat::bindings {

// Whole last dimensions, or group_size slices of them.
struct Rows {
  int64_t count;
  int64_t length;
};

inline Rows rows_of(const Tensor& x, int64_t group_size, const char* name) {
  check_min_dim(x, 1, name);
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t length = check_group_size(group_size, columns, "group_size");
  if (length > 0) return {x.numel() / length, length};
  // Empty rows have a scale each: count them by the other dimensions.
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= x.size(i);
  return {count, 0};
}

inline std::vector<int64_t> scale_sizes(const Tensor& x, int64_t group_size) {
  std::vector<int64_t> sizes = sizes_of(x);
  const int64_t columns = sizes.back();
  sizes.pop_back();
  if (group_size != -1) sizes.push_back(columns / group_size);
  return sizes;
}

}  // namespace llmqat::bindings
