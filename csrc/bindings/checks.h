// Checks, dispatch and small tensor helpers of the bindings: the last place that sees tensors.
//
// Every check names the argument. The Python layer has checked most of it already with typed
// errors; these stand between a direct call of torch.ops.llmqat_cpu.* and a wild pointer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "llmqat/quant_math.h"

namespace llmqat::bindings {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks ----

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor; move it with .cpu()");
}

inline void check_dim(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_min_dim(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() >= dim, name, ": expected at least ", dim, " dimensions, got ", t.dim());
}

// Expected shape; -1 stands for any size.
template <class Sizes = std::initializer_list<int64_t>>
void check_shape(const Tensor& t, const Sizes& shape, const char* name) {
  check_dim(t, static_cast<int64_t>(shape.size()), name);
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || t.size(i) == size, name, ": expected size ", size, " in dimension ",
                    i, ", got ", t.size(i));
    ++i;
  }
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_float_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(is_float_dtype(dtype), name, ": expected float32, bfloat16 or float16, got ",
                  dtype_name(dtype));
}

// For tensors that an op writes to: inputs go through as_contiguous instead.
inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor; call .contiguous()");
}

inline void check_bits(int64_t bits, const char* name) {
  STD_TORCH_CHECK(bits >= kMinBits && bits <= kMaxBits, name, ": expected 2 to 8, got ", bits);
}

// -1 (whole rows) or a divisor of columns. Returns the length of one quantized row.
inline int64_t check_group_size(int64_t group_size, int64_t columns, const char* name) {
  if (group_size == -1) return columns;
  STD_TORCH_CHECK(group_size > 0, name, ": expected -1 or a positive size, got ", group_size);
  STD_TORCH_CHECK(columns % group_size == 0, name, ": ", group_size,
                  " does not divide the last dimension ", columns);
  return group_size;
}

// ---- tensors ----

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Uninitialized, contiguous, on the device of like.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// Uninitialized, contiguous, on the CPU. The shim call goes past the dispatcher: a decode step
// makes some hundred outputs of a few KiB, and the boxed aten::new_empty costs more than a small
// product.
inline Tensor empty_cpu(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// ---- dispatch and threads ----

// Calls f(T{}) with T = float, bf16 or fp16; the body says `using T = decltype(tag);`.
template <class F>
auto dispatch_float(ScalarType dtype, const char* name, F&& f) {
  check_float_dtype(dtype, name);
  switch (dtype) {
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: return f(float{});
  }
}

// Torch's threads (torch.set_num_threads).
inline cpu::Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, cpu::Parallel::Body* body, const void* f) {
            torch::stable::parallel_for(0, count, grain,
                                        [=](int64_t begin, int64_t end) { body(f, begin, end); });
          }};
}

// f(begin, end) over rows of row_bytes of traffic each, on torch's threads.
template <class F>
void parallel_rows(int64_t rows, int64_t row_bytes, const F& f) {
  torch_threads().rows(rows, row_bytes, f);
}

}  // namespace llmqat::bindings
