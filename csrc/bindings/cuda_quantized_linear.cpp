// repack_weight, repacked_matmul(_silu_mul, _add), repacked_linear(_add), quantized_matmul and
// quantized_linear on CUDA tensors. Row-major weights are repacked on the way: for a test or one
// prefill, not for decoding.
#include <optional>
#include <tuple>

#include "cuda/quantized_linear.h"
#include "cuda_stream.h"
#include "llmqat/fragment_layout.h"

namespace llmqat::bindings {
namespace {

constexpr int64_t kMaxK = 131071;
constexpr int64_t kNibbleBits = 4;  // widest codes of which two share a byte

struct Packed {
  Tensor bytes;
  bool nibbles;
};

void check_device(const Tensor& t, const Tensor& like, const char* name) {
  check_cuda(t, name);
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name,
                  ": on another device than the activations");
}

int64_t columns_of(const Tensor& t, const char* name) {
  check_cuda(t, name);
  check_min_dim(t, 1, name);
  return t.size(t.dim() - 1);
}

int64_t rows_of(const Tensor& t) {
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) m *= t.size(d);
  return m;
}

// Codes [n, k] or packed pairs in the layout; nothing is awaited unless the codes are checked.
Tensor to_layout(const Tensor& w, int64_t k, bool nibbles, bool check) {
  const Tensor held = as_contiguous(w);
  const int32_t device = w.get_device_index();
  const int64_t n = w.size(0);
  Tensor out = new_empty(w, {layout_bytes(nibbles, n, k) + kTagBytes}, ScalarType::Byte);
  Tensor misfit = torch::stable::new_zeros(w, {1}, ScalarType::Int);
  void* stream = current_cuda_stream(device);
  check_launch(llmqat_cuda_repack_weight(held.const_data_ptr(), w.scalar_type() == ScalarType::Byte,
                                         n, k, nibbles, mutable_data<uint8_t>(out),
                                         mutable_data<int32_t>(misfit), stream),
               "repack_weight");
  if (check) {
    int32_t found = 0;
    check_launch(llmqat_cuda_read_int32(data<int32_t>(misfit), &found, stream), "repack_weight");
    STD_TORCH_CHECK(found == 0, "w: a code does not fit 4 bits (range -8 to 7)");
  }
  return out;
}

void check_row_major(const Tensor& w, int64_t w_bits, int64_t k) {
  check_cuda(w, "w");
  check_dim(w, 2, "w");
  check_bits(w_bits, "w_bits");
  if (w.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(w_bits == kNibbleBits, "w: packed uint8 weights have w_bits 4, got ", w_bits);
    check_shape(w, {-1, (k + 1) / 2}, "w");
  } else {
    check_dtype(w, ScalarType::Char, "w");
    check_shape(w, {-1, k}, "w");
  }
}

// A row-major weight for one product. int8 codes stay int8: whether they fit 4 bits is not known
// without waiting for the device.
Packed pack_on_the_way(const Tensor& w, int64_t w_bits, int64_t k) {
  check_row_major(w, w_bits, k);
  const bool nibbles = w.scalar_type() == ScalarType::Byte;
  return {to_layout(w, k, nibbles, false), nibbles};
}

Tensor repack_weight(const Tensor& w, int64_t w_bits) {
  check_cuda(w, "w");
  check_dim(w, 2, "w");
  const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
  if (is_float_dtype(w.scalar_type())) {  // plain torch multiplies them (float_matmul)
    Tensor kept = new_empty(w, sizes_of(w), w.scalar_type());
    return torch::stable::copy_(kept, w);
  }
  const bool pairs = w.scalar_type() == ScalarType::Byte;
  const int64_t k = (pairs ? 2 : 1) * w.size(1);
  check_row_major(w, w_bits, k);
  const bool nibbles = w_bits <= kNibbleBits;
  return to_layout(w, k, nibbles, nibbles && !pairs);
}

// Checks what all products share and runs one. a holds codes, or floats without a_scale.
Tensor product(const Tensor& a, const std::optional<Tensor>& a_scale, const Packed& w,
               const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t n,
               ScalarType dtype, bool silu_mul = false,
               const std::optional<Tensor>& residual = std::nullopt) {
  const int64_t k = columns_of(a, "a"), m = rows_of(a);
  STD_TORCH_CHECK(k <= kMaxK, "a: K = ", k, " could overflow int32; at most ", kMaxK);
  check_device(w_scale, a, "w_scale");
  check_dtype(w_scale, ScalarType::Float, "w_scale");
  check_shape(w_scale, {n}, "w_scale");
  const int out = cuda_dtype(dtype, "dtype");
  std::vector<int64_t> sizes = sizes_of(a);
  sizes.back() = silu_mul ? n / 2 : n;
  Tensor y = new_empty(a, sizes, dtype);
  const Tensor codes = as_contiguous(a), sw = as_contiguous(w_scale);
  std::optional<Tensor> sx, b;
  if (a_scale.has_value()) {
    check_device(*a_scale, a, "a_scale");
    check_dtype(*a_scale, ScalarType::Float, "a_scale");
    STD_TORCH_CHECK(a_scale->numel() == m, "a_scale: expected one value a row (", m, "), got ",
                    a_scale->numel());
    sx = as_contiguous(*a_scale);
  }
  if (bias.has_value()) {
    check_device(*bias, a, "bias");
    check_shape(*bias, {n}, "bias");
    b = as_contiguous(*bias);
  }
  std::optional<Tensor> r;
  if (residual.has_value()) {
    check_device(*residual, a, "residual");
    check_dtype(*residual, dtype, "residual");
    check_shape(*residual, sizes, "residual");
    r = as_contiguous(*residual);
  }
  LlmqatLinear problem{};
  problem.a = codes.const_data_ptr();
  problem.a_scale = sx.has_value() ? data<float>(*sx) : nullptr;
  problem.w = data<uint8_t>(w.bytes);
  problem.w_scale = data<float>(sw);
  problem.bias = b.has_value() ? b->const_data_ptr() : nullptr;
  problem.bias_dtype = b.has_value() ? cuda_dtype(b->scalar_type(), "bias") : LLMQAT_FLOAT32;
  problem.residual = r.has_value() ? r->const_data_ptr() : nullptr;
  problem.y = y.mutable_data_ptr();
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.dtype = out;
  problem.nibbles = w.nibbles;
  problem.silu_mul = silu_mul;
  void* stream = current_cuda_stream(a.get_device_index());
  check_launch(llmqat_cuda_linear_workspace(stream, &problem.workspace, &problem.sms),
               "quantized_linear");
  const auto launch = sx.has_value() ? &llmqat_cuda_integer_linear : &llmqat_cuda_float_linear;
  check_launch(launch(&problem, stream), "quantized_linear");
  return y;
}

void check_no_groups(int64_t group_size) {
  STD_TORCH_CHECK(group_size == -1,
                  "group_size: the cuda kernels take one scale a channel (-1), got ", group_size,
                  "; use backend 'triton' for groups");
}

void check_float_product(ScalarType dtype, int64_t w_bits) {
  STD_TORCH_CHECK(w_bits <= kNibbleBits && dtype != ScalarType::Float,
                  "x: the cuda kernel for float activations takes fp16 or bf16 and weights of 2 to"
                  " 4 bits, got ",
                  dtype_name(dtype), " and ", w_bits, " bits; use backend 'triton'");
}

// A weight [n, k] that repack_weight laid out, on the device of the activations `a`.
Packed laid_out(const Tensor& w, const Tensor& a, int64_t n, int64_t k, int64_t w_bits) {
  check_bits(w_bits, "w_bits");
  check_device(w, a, "w");
  check_dtype(w, ScalarType::Byte, "w");
  check_dim(w, 1, "w");
  const bool nibbles = w_bits <= kNibbleBits;
  STD_TORCH_CHECK(w.numel() == layout_bytes(nibbles, n, k) + kTagBytes, "w: ", w.numel(),
                  " bytes are no ", w_bits, "-bit weight [", n, ", ", k,
                  "] of repack_weight; lay it out with backend 'cuda'");
  const Tensor held = as_contiguous(w);
  check_aligned(held, "w");
  return {held, nibbles};
}

Tensor repacked(const Tensor& a, const Tensor& a_scale, const Tensor& w, const Tensor& w_scale,
                const std::optional<Tensor>& bias, int64_t n, int64_t w_bits, int64_t group_size,
                ScalarType dtype, bool silu_mul = false,
                const std::optional<Tensor>& residual = std::nullopt) {
  const int64_t k = columns_of(a, "a");
  check_dtype(a, ScalarType::Char, "a");
  check_no_groups(group_size);
  STD_TORCH_CHECK(n >= 0 && (!silu_mul || n % 2 == 0), "n: gates and ups are as many, got ", n);
  const Packed weight = laid_out(w, a, n, k, w_bits);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  return product(a, a_scale, weight, w_scale, bias, n, dtype, silu_mul, residual);
}

Tensor repacked_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                       const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t n,
                       int64_t w_bits, int64_t group_size, ScalarType dtype) {
  return repacked(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype);
}

Tensor repacked_matmul_add(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                           const Tensor& w_scale, const std::optional<Tensor>& bias,
                           const Tensor& residual, int64_t n, int64_t w_bits, int64_t group_size) {
  return repacked(a, a_scale, w, w_scale, bias, n, w_bits, group_size, residual.scalar_type(),
                  false, residual);
}

Tensor repacked_matmul_silu_mul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                                const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t n,
                                int64_t w_bits, int64_t group_size, ScalarType dtype) {
  return repacked(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype, true);
}

Tensor repacked_floats(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                       int64_t n, int64_t w_bits, int64_t group_size) {
  const int64_t k = columns_of(x, "x");
  check_float_dtype(x.scalar_type(), "x");
  check_no_groups(group_size);
  check_float_product(x.scalar_type(), w_bits);
  STD_TORCH_CHECK(n >= 0, "n: expected the rows of the weight, got ", n);
  const Packed weight = laid_out(w, x, n, k, w_bits);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return product(x, std::nullopt, weight, w_scale, bias, n, x.scalar_type(), false, residual);
}

Tensor repacked_linear(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                       const std::optional<Tensor>& bias, int64_t n, int64_t w_bits,
                       int64_t group_size) {
  return repacked_floats(x, w, w_scale, bias, std::nullopt, n, w_bits, group_size);
}

Tensor repacked_linear_add(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                           const std::optional<Tensor>& bias, const Tensor& residual, int64_t n,
                           int64_t w_bits, int64_t group_size) {
  return repacked_floats(x, w, w_scale, bias, residual, n, w_bits, group_size);
}

Tensor quantized_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& w,
                        const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t w_bits,
                        int64_t group_size, ScalarType dtype) {
  const int64_t k = columns_of(a, "a");
  check_dtype(a, ScalarType::Char, "a");
  check_no_groups(group_size);
  check_device(w, a, "w");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  return product(a, a_scale, pack_on_the_way(w, w_bits, k), w_scale, bias, w.size(0), dtype);
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, int64_t bits) {
  check_bits(bits, "a_bits");
  const int64_t k = columns_of(x, "x");
  const Tensor from = as_contiguous(x);
  std::vector<int64_t> sizes = sizes_of(x);
  Tensor codes = new_empty(x, sizes, ScalarType::Char);
  sizes.pop_back();
  Tensor scale = new_empty(x, sizes, ScalarType::Float);
  const int dtype = cuda_dtype(x.scalar_type(), "x");
  check_launch(
      llmqat_cuda_quantize(from.const_data_ptr(), dtype, rows_of(x), k, k, static_cast<int>(bits),
                           false, mutable_data<int8_t>(codes), mutable_data<float>(scale),
                           current_cuda_stream(x.get_device_index())),
      "quantize");
  return {codes, scale};
}

Tensor quantized_linear(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                        const std::optional<Tensor>& bias, int64_t w_bits, int64_t a_bits,
                        int64_t group_size) {
  const int64_t k = columns_of(x, "x");
  check_float_dtype(x.scalar_type(), "x");
  check_no_groups(group_size);
  check_device(w, x, "w");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = x.scalar_type();
  if (a_bits < 16) {
    const auto [codes, scale] = quantize_rows(x, a_bits);
    const Packed packed = pack_on_the_way(w, w_bits, k);
    return product(codes, scale, packed, w_scale, bias, w.size(0), dtype);
  }
  STD_TORCH_CHECK(a_bits == 16 || a_bits == 32, "a_bits: expected 2 to 8, 16 or 32, got ", a_bits);
  check_float_product(dtype, w_bits);
  check_row_major(w, w_bits, k);
  return product(x, std::nullopt, {to_layout(w, k, true, false), true}, w_scale, bias, w.size(0),
                 dtype);
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cuda, m) {
  m.def("repack_weight(Tensor w, int w_bits) -> Tensor");
  m.def(
      "repacked_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int n, "
      "int w_bits, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "repacked_matmul_silu_mul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, "
      "int n, int w_bits, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "repacked_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int n, int w_bits,"
      " int group_size) -> Tensor");
  m.def(
      "repacked_matmul_add(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, "
      "Tensor residual, int n, int w_bits, int group_size) -> Tensor");
  m.def(
      "repacked_linear_add(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, Tensor residual, int "
      "n, int w_bits, int group_size) -> Tensor");
  m.def(
      "quantized_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int "
      "w_bits, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int w_bits, int a_bits,"
      " int group_size=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cuda, CUDA, m) {
  m.impl("repack_weight", TORCH_BOX(&llmqat::bindings::repack_weight));
  m.impl("repacked_matmul", TORCH_BOX(&llmqat::bindings::repacked_matmul));
  m.impl("repacked_matmul_silu_mul", TORCH_BOX(&llmqat::bindings::repacked_matmul_silu_mul));
  m.impl("repacked_matmul_add", TORCH_BOX(&llmqat::bindings::repacked_matmul_add));
  m.impl("repacked_linear", TORCH_BOX(&llmqat::bindings::repacked_linear));
  m.impl("repacked_linear_add", TORCH_BOX(&llmqat::bindings::repacked_linear_add));
  m.impl("quantized_matmul", TORCH_BOX(&llmqat::bindings::quantized_matmul));
  m.impl("quantized_linear", TORCH_BOX(&llmqat::bindings::quantized_linear));
}
