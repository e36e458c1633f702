// Producers of quantized rows: RMSNorm and SiLU * up, alone and fused with quantization.
#include "cpu/norm.h"

#include <tuple>

#include "checks.h"
#include "cpu/activation.h"

namespace llmqat::bindings {
namespace {

// The outputs of one call; y is absent in the inference forms, codes and scale in the plain ones.
struct Outputs {
  std::optional<Tensor> y, codes, scale;
};

Outputs make_outputs(const Tensor& x, bool with_y, bool with_codes) {
  Outputs out;
  std::vector<int64_t> sizes = sizes_of(x);
  if (with_y) out.y = empty_cpu(sizes, x.scalar_type());
  if (with_codes) {
    out.codes = empty_cpu(sizes, ScalarType::Char);
    sizes.pop_back();
    out.scale = empty_cpu(sizes, ScalarType::Float);
  }
  return out;
}

int64_t row_count(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= x.size(i);
  return count;
}

template <class T>
cpu::RowOutput<T> pointers(const Outputs& out, int64_t bits) {
  return {out.y ? mutable_data<T>(*out.y) : nullptr,
          out.codes ? mutable_data<int8_t>(*out.codes) : nullptr,
          out.scale ? mutable_data<float>(*out.scale) : nullptr, static_cast<int>(bits)};
}

std::vector<float> widened(const Tensor& weight_) {
  const Tensor weight = as_contiguous(weight_);
  std::vector<float> wide(static_cast<size_t>(weight.numel()));
  dispatch_float(weight.scalar_type(), "weight", [&](auto tag) {
    using T = decltype(tag);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(data<T>(weight)[i]);
  });
  return wide;
}

// Returns x + residual, where there is a residual.
std::optional<Tensor> run_norm(const Tensor& x_, const Tensor& weight, double eps, int64_t bits,
                               const std::optional<Tensor>& residual_, const Outputs& out) {
  const Tensor x = as_contiguous(x_);
  const int64_t n = x.size(x.dim() - 1);
  const bool adds = residual_.has_value();
  const Tensor residual = adds ? as_contiguous(*residual_) : x;
  std::optional<Tensor> total;
  if (adds) total = empty_cpu(sizes_of(x), x.scalar_type());
  const bool is_wide = weight.scalar_type() == ScalarType::Float && weight.is_contiguous();
  const std::vector<float> copy = is_wide ? std::vector<float>() : widened(weight);
  const float* weights = is_wide ? data<float>(weight) : copy.data();
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    cpu::rms_norm_rows(torch_threads(), data<T>(x), adds ? data<T>(residual) : nullptr, weights,
                       row_count(x), n, static_cast<float>(eps),
                       adds ? mutable_data<T>(*total) : nullptr, pointers<T>(out, bits));
  });
  return total;
}

void check_norm(const Tensor& x, const Tensor& weight) {
  check_cpu(x, "x");
  check_cpu(weight, "weight");
  check_min_dim(x, 1, "x");
  check_float_dtype(x.scalar_type(), "x");
  check_float_dtype(weight.scalar_type(), "weight");
  check_shape(weight, {x.size(x.dim() - 1)}, "weight");
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_norm(x, weight);
  const Outputs out = make_outputs(x, true, false);
  run_norm(x, weight, eps, 8, std::nullopt, out);
  return *out.y;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                                     double eps, int64_t bits,
                                                     std::optional<Tensor> residual) {
  check_norm(x, weight);
  check_bits(bits, "bits");
  if (residual) {
    check_cpu(*residual, "residual");
    check_dtype(*residual, x.scalar_type(), "residual");
    STD_TORCH_CHECK(sizes_of(*residual) == sizes_of(x), "residual: expected the shape of x");
  }
  const Outputs out = make_outputs(x, false, true);
  const std::optional<Tensor> total = run_norm(x, weight, eps, bits, residual, out);
  return {*out.codes, *out.scale, total ? *total : empty_cpu({0}, x.scalar_type())};
}

void run_silu(const Tensor& gate_, const Tensor& up_, int64_t bits, const Outputs& out) {
  const Tensor gate = as_contiguous(gate_), up = as_contiguous(up_);
  const int64_t n = gate.size(gate.dim() - 1);
  dispatch_float(gate.scalar_type(), "gate", [&](auto tag) {
    using T = decltype(tag);
    cpu::silu_mul_rows(torch_threads(), data<T>(gate), data<T>(up), n, row_count(gate), n,
                       pointers<T>(out, bits));
  });
}

void check_silu(const Tensor& gate, const Tensor& up) {
  check_cpu(gate, "gate");
  check_cpu(up, "up");
  check_min_dim(gate, 1, "gate");
  check_float_dtype(gate.scalar_type(), "gate");
  check_dtype(up, gate.scalar_type(), "up");
  STD_TORCH_CHECK(sizes_of(up) == sizes_of(gate), "up: expected the shape of gate");
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  check_silu(gate, up);
  const Outputs out = make_outputs(gate, true, false);
  run_silu(gate, up, 8, out);
  return *out.y;
}

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate, const Tensor& up, int64_t bits) {
  check_silu(gate, up);
  check_bits(bits, "bits");
  const Outputs out = make_outputs(gate, false, true);
  run_silu(gate, up, bits, out);
  return {*out.codes, *out.scale};
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "rms_norm_quantize(Tensor x, Tensor weight, float eps, int bits, Tensor? residual=None)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_quantize(Tensor gate, Tensor up, int bits) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&llmqat::bindings::rms_norm));
  m.impl("rms_norm_quantize", TORCH_BOX(&llmqat::bindings::rms_norm_quantize));
  m.impl("silu_mul", TORCH_BOX(&llmqat::bindings::silu_mul));
  m.impl("silu_mul_quantize", TORCH_BOX(&llmqat::bindings::silu_mul_quantize));
}
