// The weight argument of the matrix operators: row-major or repacked, checked, with its scales.
#pragma once

#include "checks.h"
#include "cpu/quantized_matmul.h"
#include "cpu/repack.h"

namespace llmqat::bindings {

using cpu::Layout;

struct Weight {
  Tensor keep;
  Layout layout;
  int64_t n;
  const void* bytes;
};

// Row-major codes or nibbles with k columns.
inline Weight row_major(const Tensor& w, int64_t w_bits, int64_t k) {
  check_cpu(w, "w");
  check_dim(w, 2, "w");
  check_bits(w_bits, "w_bits");
  const Tensor held = as_contiguous(w);
  if (w.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(w_bits == 4, "w: packed uint8 weights have w_bits 4, got ", w_bits);
    check_shape(w, {-1, cpu::ceil_div(k, 2)}, "w");
    return {held, Layout::nibbles, w.size(0), held.const_data_ptr()};
  }
  check_dtype(w, ScalarType::Char, "w");
  check_shape(w, {-1, k}, "w");
  return {held, Layout::codes, w.size(0), held.const_data_ptr()};
}

inline cpu::PackedHeader packed_header(const Tensor& packed) {
  check_cpu(packed, "w");
  check_dtype(packed, ScalarType::Byte, "w");
  check_dim(packed, 1, "w");
  cpu::PackedHeader header;
  STD_TORCH_CHECK(cpu::read_header(packed.const_data_ptr(), packed.numel(), header),
                  "w: not a weight made by repack_weight; call repack_weight first");
  return header;
}

inline Weight repacked(const Tensor& w, int64_t w_bits, int64_t n, int64_t k) {
  check_bits(w_bits, "w_bits");
  const Tensor held = as_contiguous(w);
  const cpu::PackedHeader header = packed_header(held);
  const Layout expected = w_bits <= 4 ? Layout::panels4 : Layout::panels8;
  STD_TORCH_CHECK(header.layout == expected, "w: repacked for another bit width than w_bits ",
                  w_bits, "; call repack_weight with it");
  STD_TORCH_CHECK(header.n == n, "n: the repacked weight has ", header.n, " rows, got ", n);
  // Nibbles do not tell an odd K: repack_weight saw one column more, whose code is 0.
  STD_TORCH_CHECK(header.k == k || (header.k == k + 1 && k % 2 != 0 && expected == Layout::panels4),
                  "w: repacked for K = ", header.k, ", but the activations have K = ", k);
  return {held, expected, n, static_cast<const char*>(held.const_data_ptr()) + cpu::kHeaderBytes};
}

// A repacked integer weight whose width and rows are its own; n = -1 takes any number of rows.
inline Weight repacked_codes(const Tensor& w, int64_t n, int64_t k) {
  const cpu::PackedHeader header = packed_header(w);
  const int64_t bits = header.layout == Layout::panels4 ? 4 : kMaxBits;
  return repacked(w, bits, n == -1 ? header.n : n, k);
}

// The scale of a weight: [N], or [N, groups].
inline Tensor weight_scale(const Tensor& w_scale, int64_t n, int64_t k, int64_t group_size) {
  check_cpu(w_scale, "w_scale");
  check_dtype(w_scale, ScalarType::Float, "w_scale");
  check_group_size(group_size, k, "group_size");
  if (group_size == -1) {
    check_shape(w_scale, {n}, "w_scale");
  } else {
    check_shape(w_scale, {n, k / group_size}, "w_scale");
  }
  return as_contiguous(w_scale);
}

// Integer scales of groups uint8 [N, groups] (spec 18), contiguous.
inline Tensor group_multiplier(const Tensor& w_multiplier, int64_t group_size) {
  check_cpu(w_multiplier, "w_multiplier");
  check_dtype(w_multiplier, ScalarType::Byte, "w_multiplier");
  check_dim(w_multiplier, 2, "w_multiplier");
  STD_TORCH_CHECK(group_size > 0, "group_size: expected a positive size, got ", group_size);
  STD_TORCH_CHECK(w_multiplier.size(1) <= kMaxIntegerGroupK / group_size,
                  "w_multiplier: ", w_multiplier.size(1), " groups of ", group_size,
                  " could overflow int32; at most K = ", kMaxIntegerGroupK);
  return as_contiguous(w_multiplier);
}

}  // namespace llmqat::bindings
