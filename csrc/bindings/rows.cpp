// Row operators: quantize, quantize_integer_groups, dequantize, fake_quantize (+ backward),
// pack_int4, unpack_int4.
#include "cpu/rows.h"

#include <cstring>
#include <tuple>

#include "cpu/int4_rows.h"
#include "cpu/integer_groups.h"
#include "rows_shape.h"

namespace llmqat::bindings {
namespace {

std::tuple<Tensor, Tensor> quantize(const Tensor& x_, int64_t bits, int64_t group_size,
                                    bool bf16_scale) {
  check_cpu(x_, "x");
  check_bits(bits, "bits");
  const Rows rows = rows_of(x_, group_size, "x");
  const Tensor x = as_contiguous(x_);
  Tensor codes = empty_cpu(sizes_of(x), ScalarType::Char);
  Tensor scale = empty_cpu(scale_sizes(x, group_size), ScalarType::Float);
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    cpu::quantize_rows(torch_threads(), data<decltype(tag)>(x), rows.count, rows.length,
                       static_cast<int>(bits), bf16_scale, mutable_data<int8_t>(codes),
                       mutable_data<float>(scale));
  });
  return {codes, scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_integer_groups(const Tensor& x_, int64_t bits,
                                                           int64_t group_size) {
  check_cpu(x_, "x");
  check_bits(bits, "bits");
  STD_TORCH_CHECK(bits <= 4, "bits: integer groups hold 2 to 4 bits, got ", bits);
  STD_TORCH_CHECK(group_size > 0, "group_size: expected a positive size, got ", group_size);
  const Rows rows = rows_of(x_, -1, "x");
  check_group_size(group_size, rows.length, "group_size");
  const Tensor x = as_contiguous(x_);
  Tensor codes = empty_cpu(sizes_of(x), ScalarType::Char);
  Tensor multiplier = empty_cpu(scale_sizes(x, group_size), ScalarType::Byte);
  Tensor scale = empty_cpu(scale_sizes(x, -1), ScalarType::Float);
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    cpu::quantize_integer_groups(torch_threads(), data<decltype(tag)>(x), rows.count,
                                 rows.length / group_size, group_size, static_cast<int>(bits),
                                 mutable_data<int8_t>(codes), mutable_data<uint8_t>(multiplier),
                                 mutable_data<float>(scale));
  });
  return {codes, multiplier, scale};
}

Tensor dequantize(const Tensor& codes_, const Tensor& scale_, int64_t group_size,
                  ScalarType dtype) {
  check_cpu(codes_, "codes");
  check_cpu(scale_, "scale");
  check_dtype(codes_, ScalarType::Char, "codes");
  check_dtype(scale_, ScalarType::Float, "scale");
  const Rows rows = rows_of(codes_, group_size, "codes");
  STD_TORCH_CHECK(sizes_of(scale_) == scale_sizes(codes_, group_size),
                  "scale: expected the shape of codes without its last dimension",
                  group_size == -1 ? "" : ", plus one of groups");
  const Tensor codes = as_contiguous(codes_), scale = as_contiguous(scale_);
  Tensor y = empty_cpu(sizes_of(codes), dtype);
  dispatch_float(dtype, "dtype", [&](auto tag) {
    using T = decltype(tag);
    const int8_t* in = data<int8_t>(codes);
    const float* scales = data<float>(scale);
    T* out = mutable_data<T>(y);
    parallel_rows(rows.count, rows.length * (sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * rows.length;
        cpu::dequantize_row(in + at, rows.length, scales[r], out + at);
      }
    });
  });
  return y;
}

Tensor fake_quantize(const Tensor& x_, int64_t bits, int64_t group_size,
                     std::optional<double> /*ste_clip: only the gradient's*/, bool bf16_scale) {
  check_cpu(x_, "x");
  check_bits(bits, "bits");
  const Rows rows = rows_of(x_, group_size, "x");
  const Tensor x = as_contiguous(x_);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    parallel_rows(rows.count, rows.length * 2 * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * rows.length;
        cpu::fake_quantize_row(in + at, rows.length, static_cast<int>(bits), bf16_scale, out + at);
      }
    });
  });
  return y;
}

Tensor fake_quantize_backward(const Tensor& grad_, const Tensor& x_,
                              std::optional<double> ste_clip) {
  check_cpu(grad_, "grad");
  check_cpu(x_, "x");
  check_dtype(grad_, x_.scalar_type(), "grad");
  STD_TORCH_CHECK(sizes_of(grad_) == sizes_of(x_), "grad: expected the shape of x");
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_);
  Tensor out = empty_cpu(sizes_of(grad), grad.scalar_type());
  dispatch_float(grad.scalar_type(), "grad", [&](auto tag) {
    using T = decltype(tag);
    const T* from = data<T>(grad);
    const T* values = data<T>(x);
    T* to = mutable_data<T>(out);
    parallel_rows(grad.numel(), 3 * sizeof(T), [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      if (ste_clip.has_value()) {
        const float clip = static_cast<float>(*ste_clip);
        cpu::mask_gradient(from + begin, values + begin, n, clip, to + begin);
      } else {
        std::memcpy(to + begin, from + begin, n * sizeof(T));
      }
    });
  });
  return out;
}

Tensor pack_int4(const Tensor& codes_) {
  check_cpu(codes_, "codes");
  check_dtype(codes_, ScalarType::Char, "codes");
  const Rows rows = rows_of(codes_, -1, "codes");
  const Tensor codes = as_contiguous(codes_);
  std::vector<int64_t> sizes = sizes_of(codes);
  const int64_t bytes = packed_size(rows.length);
  sizes.back() = bytes;
  Tensor packed = empty_cpu(sizes, ScalarType::Byte);
  const int8_t* in = data<int8_t>(codes);
  uint8_t* out = mutable_data<uint8_t>(packed);
  parallel_rows(rows.count, rows.length + bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      cpu::pack_row(in + r * rows.length, rows.length, out + r * bytes);
    }
  });
  return packed;
}

Tensor unpack_int4(const Tensor& packed_, int64_t columns) {
  check_cpu(packed_, "packed");
  check_dtype(packed_, ScalarType::Byte, "packed");
  const Rows rows = rows_of(packed_, -1, "packed");
  STD_TORCH_CHECK(columns >= 0 && packed_size(columns) == rows.length, "columns: ", columns,
                  " does not fit ", rows.length, " packed bytes a row");
  const Tensor packed = as_contiguous(packed_);
  std::vector<int64_t> sizes = sizes_of(packed);
  sizes.back() = columns;
  Tensor codes = empty_cpu(sizes, ScalarType::Char);
  const uint8_t* in = data<uint8_t>(packed);
  int8_t* out = mutable_data<int8_t>(codes);
  parallel_rows(rows.count, rows.length + columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      cpu::unpack_row(in + r * rows.length, columns, out + r * columns);
    }
  });
  return codes;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def(
      "quantize(Tensor x, int bits, int group_size=-1, bool bf16_scale=False) -> (Tensor, Tensor)");
  m.def("quantize_integer_groups(Tensor x, int bits, int group_size) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize(Tensor codes, Tensor scale, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "fake_quantize(Tensor x, int bits, int group_size=-1, float? ste_clip=None,"
      " bool bf16_scale=False) -> Tensor");
  m.def("fake_quantize_backward(Tensor grad, Tensor x, float? ste_clip) -> Tensor");
  m.def("pack_int4(Tensor codes) -> Tensor");
  m.def("unpack_int4(Tensor packed, int columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("quantize", TORCH_BOX(&llmqat::bindings::quantize));
  m.impl("quantize_integer_groups", TORCH_BOX(&llmqat::bindings::quantize_integer_groups));
  m.impl("dequantize", TORCH_BOX(&llmqat::bindings::dequantize));
  m.impl("fake_quantize", TORCH_BOX(&llmqat::bindings::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&llmqat::bindings::fake_quantize_backward));
  m.impl("pack_int4", TORCH_BOX(&llmqat::bindings::pack_int4));
  m.impl("unpack_int4", TORCH_BOX(&llmqat::bindings::unpack_int4));
}
