// Bindings of the matrix operators: int_matmul, quantized_matmul, integer_group_matmul,
// quantized_linear, qat_linear, repack_weight, repacked_matmul, repacked_linear, float_matmul.
// Shapes and meaning: llmqat_kernels/schemas.py; docs/spec.md 7, 8, 17 and 18.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/float_matmul.h"
#include "cpu/int4_rows.h"
#include "cpu/matmul_cuts.h"
#include "cpu/quantized_matmul.h"
#include "cpu/rows.h"
#include "matmul_weights.h"

namespace llmqat::bindings {
namespace {

using cpu::OutType;

OutType out_type(ScalarType dtype, const char* name) {
  check_float_dtype(dtype, name);
  return dtype == ScalarType::BFloat16 ? OutType::bfloat16
         : dtype == ScalarType::Half   ? OutType::float16
                                       : OutType::float32;
}

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(t);
  sizes.back() = last;
  return sizes;
}

// fp32, contiguous; other float dtypes are widened (exact).
Tensor as_float32(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Float) return as_contiguous(t);
  const Tensor from = as_contiguous(t);
  Tensor to = empty_cpu(sizes_of(t), ScalarType::Float);
  dispatch_float(t.scalar_type(), name, [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(from);
    float* out = mutable_data<float>(to);
    parallel_rows(t.numel(), sizeof(T) + 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = to_float(in[i]);
    });
  });
  return to;
}

std::optional<Tensor> bias_float32(const std::optional<Tensor>& bias, int64_t n) {
  if (!bias.has_value()) return std::nullopt;
  check_cpu(*bias, "bias");
  check_shape(*bias, {n}, "bias");
  return as_float32(*bias, "bias");
}

const float* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? data<float>(*t) : nullptr;
}

// ---- integer products ---------------------------------------------------------------------------

struct Rows {
  int64_t m, k;
};

Rows rows_of(const Tensor& t, const char* name) {
  check_cpu(t, name);
  check_min_dim(t, 1, name);
  const int64_t k = t.size(t.dim() - 1);
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) m *= t.size(d);
  return {m, k};
}

Rows activation_rows(const Tensor& a) {
  const Rows rows = rows_of(a, "a");
  check_dtype(a, ScalarType::Char, "a");
  STD_TORCH_CHECK(rows.k <= cpu::kMaxK, "a: K = ", rows.k, " could overflow int32; at most ",
                  cpu::kMaxK);
  return rows;
}

void run_integer(const cpu::QuantizedProblem& problem) {
  if (problem.m == 0 || problem.n == 0) return;
  cpu::run_parallel(torch_threads(), cpu::QuantizedMatmul(problem), problem.m,
                    cpu::panel_bytes(problem.layout, problem.k));
}

Tensor int_matmul(const Tensor& a, const Tensor& w, int64_t w_bits) {
  const auto [m, k] = activation_rows(a);
  const Weight weight = row_major(w, w_bits, k);
  const Tensor codes = as_contiguous(a);
  Tensor y = empty_cpu(with_last(a, weight.n), ScalarType::Int);
  run_integer({data<int8_t>(codes), nullptr, m, weight.n, k, weight.bytes, weight.layout, nullptr,
               -1, nullptr, OutType::int32, y.mutable_data_ptr()});
  return y;
}

Tensor scaled_product(const Tensor& a, const Tensor& a_scale, const Weight& weight,
                      const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t group_size,
                      ScalarType dtype, const std::optional<Tensor>& multiplier = std::nullopt) {
  const auto [m, k] = activation_rows(a);
  check_cpu(a_scale, "a_scale");
  check_dtype(a_scale, ScalarType::Float, "a_scale");
  STD_TORCH_CHECK(a_scale.numel() == m, "a_scale: expected one value a row (", m, "), got ",
                  a_scale.numel());
  const Tensor sw = weight_scale(w_scale, weight.n, k, multiplier.has_value() ? -1 : group_size);
  const std::optional<Tensor> b = bias_float32(bias, weight.n);
  const Tensor codes = as_contiguous(a), sx = as_contiguous(a_scale);
  const OutType type = out_type(dtype, "dtype");
  Tensor y = empty_cpu(with_last(a, weight.n), dtype);
  run_integer({data<int8_t>(codes), data<float>(sx), m, weight.n, k, weight.bytes, weight.layout,
               data<float>(sw), group_size, pointer(b), type, y.mutable_data_ptr(),
               multiplier.has_value() ? data<uint8_t>(*multiplier) : nullptr});
  return y;
}

// int8 codes [..., k] of activations that may be packed, two codes a byte.
Tensor activation_codes(const Tensor& a, int64_t k) {
  const Rows packed = rows_of(a, "a");
  if (a.scalar_type() != ScalarType::Byte) return a;
  STD_TORCH_CHECK(packed.k == cpu::ceil_div(k, 2), "a: expected ", cpu::ceil_div(k, 2),
                  " packed bytes a row, got ", packed.k);
  const Tensor held = as_contiguous(a);
  Tensor codes = empty_cpu(with_last(a, k), ScalarType::Char);
  const uint8_t* from = data<uint8_t>(held);
  int8_t* to = mutable_data<int8_t>(codes);
  parallel_rows(packed.m, packed.k + k, [&, bytes = packed.k](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) cpu::unpack_row(from + r * bytes, k, to + r * k);
  });
  return codes;
}

// w: int8 codes, packed nibbles, or the layout of repack_weight.
Tensor integer_group_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                            const Tensor& w_multiplier, const Tensor& w_scale,
                            const std::optional<Tensor>& bias, int64_t group_size,
                            ScalarType dtype) {
  const Tensor multiplier = group_multiplier(w_multiplier, group_size);
  const int64_t n = multiplier.size(0), k = multiplier.size(1) * group_size;
  const Tensor codes = activation_codes(a, k);
  STD_TORCH_CHECK(rows_of(codes, "a").k == k, "a: expected ", k, " columns in groups of ",
                  group_size, ", got ", rows_of(codes, "a").k);
  const int64_t bits = w.scalar_type() == ScalarType::Byte ? 4 : kMaxBits;
  const Weight weight = w.dim() == 1 ? repacked_codes(w, n, k) : row_major(w, bits, k);
  STD_TORCH_CHECK(weight.n == n, "w: expected ", n, " rows as w_multiplier has, got ", weight.n);
  return scaled_product(codes, a_scale, weight, w_scale, bias, group_size, dtype, multiplier);
}

Tensor quantized_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                        const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t w_bits,
                        int64_t group_size, ScalarType dtype) {
  const Weight weight = row_major(w, w_bits, activation_rows(a).k);
  return scaled_product(a, a_scale, weight, w_scale, bias, group_size, dtype);
}

Tensor repacked_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                       const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t n,
                       int64_t w_bits, int64_t group_size, ScalarType dtype) {
  const Weight weight = repacked(w, w_bits, n, activation_rows(a).k);
  return scaled_product(a, a_scale, weight, w_scale, bias, group_size, dtype);
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, int64_t a_bits) {
  const auto [m, k] = rows_of(x, "x");
  check_bits(a_bits, "a_bits");
  const Tensor from = as_contiguous(x);
  Tensor codes = empty_cpu(sizes_of(x), ScalarType::Char);
  std::vector<int64_t> scale_sizes = sizes_of(x);
  scale_sizes.pop_back();
  Tensor scale = empty_cpu(scale_sizes, ScalarType::Float);
  dispatch_float(x.scalar_type(), "x", [&, k = k, m = m](auto tag) {
    cpu::quantize_rows(torch_threads(), data<decltype(tag)>(from), m, k, static_cast<int>(a_bits),
                       false, mutable_data<int8_t>(codes), mutable_data<float>(scale));
  });
  return {codes, scale};
}

// Activations off (A16, spec 7): fp32 product of x and the weight dequantized to x's dtype.
Tensor float_linear(const Tensor& x, const Weight& weight, const Tensor& w_scale,
                    const std::optional<Tensor>& bias, int64_t group_size) {
  const auto [m, k] = rows_of(x, "x");
  const OutType type = out_type(x.scalar_type(), "x");
  const Tensor sw = weight_scale(w_scale, weight.n, k, group_size);
  const std::optional<Tensor> b = bias_float32(bias, weight.n);
  const Tensor x32 = as_float32(x, "x");
  Tensor y = empty_cpu(with_last(x, weight.n), x.scalar_type());
  const cpu::RoundTo round = type == OutType::bfloat16  ? cpu::RoundTo::bfloat16
                             : type == OutType::float16 ? cpu::RoundTo::float16
                                                        : cpu::RoundTo::none;
  const cpu::FloatProblem problem{.x = data<float>(x32),
                                  .m = m,
                                  .n = weight.n,
                                  .k = k,
                                  .w = weight.bytes,
                                  .layout = weight.layout,
                                  .w_scale = data<float>(sw),
                                  .group_size = group_size == -1 ? k : group_size,
                                  .round = round,
                                  .bias = pointer(b),
                                  .out_type = type,
                                  .y = y.mutable_data_ptr()};
  // Codes in panels are read as they are; row-major ones are work like the floats they become.
  const bool panels = weight.layout == Layout::panels4 || weight.layout == Layout::panels8;
  const int64_t bytes =
      panels ? cpu::panel_bytes(weight.layout, k) : k * cpu::kPanelChannels * int64_t{4};
  cpu::run_parallel(torch_threads(), cpu::FloatMatmul(problem), m, bytes);
  return y;
}

Tensor repacked_linear(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                       const std::optional<Tensor>& bias, int64_t n, int64_t w_bits,
                       int64_t group_size) {
  return float_linear(x, repacked(w, w_bits, n, rows_of(x, "x").k), w_scale, bias, group_size);
}

Tensor quantized_linear(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                        const std::optional<Tensor>& bias, int64_t w_bits, int64_t a_bits,
                        int64_t group_size) {
  const Weight weight = row_major(w, w_bits, rows_of(x, "x").k);
  if (a_bits == 16 || a_bits == 32) return float_linear(x, weight, w_scale, bias, group_size);
  const auto [codes, scale] = quantize_rows(x, a_bits);
  return scaled_product(codes, scale, weight, w_scale, bias, group_size, x.scalar_type());
}

// weight and ste_clip are for the backward pass, which autograd composes from other operators.
std::tuple<Tensor, Tensor, Tensor> qat_linear(const Tensor& x, const Tensor& weight,
                                              const Tensor& w_codes, const Tensor& w_scale,
                                              const std::optional<Tensor>& bias, int64_t a_bits,
                                              int64_t group_size, std::optional<double> ste_clip) {
  check_dtype(w_codes, ScalarType::Char, "w_codes");
  check_dim(w_codes, 2, "w_codes");
  check_shape(weight, {w_codes.size(0), w_codes.size(1)}, "weight");
  const Weight codes_w = row_major(w_codes, kMaxBits, rows_of(x, "x").k);
  const auto [codes, scale] = quantize_rows(x, a_bits);
  return {scaled_product(codes, scale, codes_w, w_scale, bias, group_size, x.scalar_type()), codes,
          scale};
}

// ---- layouts ------------------------------------------------------------------------------------

Tensor new_packed(Layout layout, int64_t n, int64_t k) {
  Tensor packed = empty_cpu({cpu::packed_bytes(layout, n, k)}, ScalarType::Byte);
  cpu::write_header(packed.mutable_data_ptr(), layout, n, k);
  return packed;
}

Tensor repack_floats(const Tensor& w, int64_t w_bits) {
  STD_TORCH_CHECK(w_bits == 16 || w_bits == 32,
                  "w_bits: expected 16 or 32 for a float weight, got ", w_bits);
  const int64_t n = w.size(0), k = w.size(1);
  const Layout layout =
      w.scalar_type() == ScalarType::BFloat16 ? Layout::panels_bf16 : Layout::panels_f32;
  const Tensor held = as_contiguous(w);
  Tensor packed = new_packed(layout, n, k);
  uint8_t* panels = mutable_data<uint8_t>(packed) + cpu::kHeaderBytes;
  dispatch_float(w.scalar_type(), "w", [&](auto tag) {
    using T = decltype(tag);
    parallel_rows(cpu::ceil_div(n, cpu::kFloatPanel), cpu::panel_bytes(layout, k),
                  [&](int64_t begin, int64_t end) {
                    cpu::repack_float(data<T>(held), n, k, begin, end, panels);
                  });
  });
  return packed;
}

Tensor repack_weight(const Tensor& w, int64_t w_bits) {
  check_cpu(w, "w");
  check_dim(w, 2, "w");
  if (is_float_dtype(w.scalar_type())) return repack_floats(w, w_bits);
  const bool nibbles = w.scalar_type() == ScalarType::Byte;
  const int64_t k = nibbles ? 2 * w.size(1) : w.size(1);
  const Weight weight = row_major(w, w_bits, k);
  const Layout target = w_bits <= 4 ? Layout::panels4 : Layout::panels8;
  Tensor packed = new_packed(target, weight.n, k);
  uint8_t* panels = mutable_data<uint8_t>(packed) + cpu::kHeaderBytes;
  const int64_t count = cpu::ceil_div(weight.n, cpu::kPanelChannels);
  std::vector<char> fits(static_cast<size_t>(count), 1);
  parallel_rows(count, cpu::panel_bytes(target, k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      fits[p] = cpu::repack_int(weight.bytes, weight.layout, weight.n, k, target, p, p + 1, panels);
    }
  });
  for (const char ok : fits)
    STD_TORCH_CHECK(ok, "w: a code does not fit w_bits ", w_bits, " (range -8 to 7)");
  return packed;
}

Tensor float_matmul(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                    int64_t n) {
  const auto [m, k] = rows_of(x, "x");
  const OutType type = out_type(x.scalar_type(), "x");
  const Tensor held = as_contiguous(w);
  const cpu::PackedHeader header = packed_header(held);
  STD_TORCH_CHECK(header.layout == Layout::panels_f32 || header.layout == Layout::panels_bf16,
                  "w: repacked from integer codes; float_matmul takes a float weight");
  STD_TORCH_CHECK(header.n == n, "n: the repacked weight has ", header.n, " rows, got ", n);
  STD_TORCH_CHECK(header.k == k, "w: repacked for K = ", header.k, ", but x has K = ", k);
  const std::optional<Tensor> b = bias_float32(bias, n);
  const Tensor x32 = as_float32(x, "x");
  Tensor y = empty_cpu(with_last(x, n), x.scalar_type());
  const cpu::FloatProblem problem{.x = data<float>(x32),
                                  .m = m,
                                  .n = n,
                                  .k = k,
                                  .w = data<uint8_t>(held) + cpu::kHeaderBytes,
                                  .layout = header.layout,
                                  .bias = pointer(b),
                                  .out_type = type,
                                  .y = y.mutable_data_ptr()};
  cpu::run_parallel(torch_threads(), cpu::FloatMatmul(problem), m,
                    cpu::panel_bytes(header.layout, k));
  return y;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def("int_matmul(Tensor a, Tensor w, int w_bits) -> Tensor");
  m.def(
      "quantized_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int "
      "w_bits,"
      " int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "integer_group_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_multiplier, Tensor "
      "w_scale, Tensor? bias, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int w_bits, int a_bits,"
      " int group_size=-1) -> Tensor");
  m.def(
      "qat_linear(Tensor x, Tensor weight, Tensor w_codes, Tensor w_scale, Tensor? bias, int "
      "a_bits,"
      " int group_size=-1, float? ste_clip=None) -> (Tensor, Tensor, Tensor)");
  m.def("repack_weight(Tensor w, int w_bits) -> Tensor");
  m.def(
      "repacked_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int n, "
      "int w_bits,"
      " int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "repacked_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int n, int w_bits,"
      " int group_size) -> Tensor");
  m.def("float_matmul(Tensor x, Tensor w, Tensor? bias, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("int_matmul", TORCH_BOX(&llmqat::bindings::int_matmul));
  m.impl("quantized_matmul", TORCH_BOX(&llmqat::bindings::quantized_matmul));
  m.impl("integer_group_matmul", TORCH_BOX(&llmqat::bindings::integer_group_matmul));
  m.impl("quantized_linear", TORCH_BOX(&llmqat::bindings::quantized_linear));
  m.impl("qat_linear", TORCH_BOX(&llmqat::bindings::qat_linear));
  m.impl("repack_weight", TORCH_BOX(&llmqat::bindings::repack_weight));
  m.impl("repacked_matmul", TORCH_BOX(&llmqat::bindings::repacked_matmul));
  m.impl("repacked_linear", TORCH_BOX(&llmqat::bindings::repacked_linear));
  m.impl("float_matmul", TORCH_BOX(&llmqat::bindings::float_matmul));
}
