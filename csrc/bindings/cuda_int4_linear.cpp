// integer_group_matmul on CUDA tensors (spec 18).
#include <optional>

#include "cuda/int4_linear.h"
#include "cuda_stream.h"
#include "llmqat/heuristics_int4.h"
#include "llmqat/quant_math.h"

namespace llmqat::bindings {
namespace {

// A contiguous tensor on the device of a.
Tensor operand(const Tensor& t, const Tensor& a, ScalarType dtype,
               std::initializer_list<int64_t> shape, const char* name) {
  check_cuda(t, name);
  STD_TORCH_CHECK(t.get_device_index() == a.get_device_index(), name, ": on another device than a");
  check_dtype(t, dtype, name);
  check_shape(t, shape, name);
  return as_contiguous(t);
}

// Whether codes are packed, two a byte.
bool is_packed(const Tensor& codes, const char* name) {
  if (codes.scalar_type() == ScalarType::Byte) return true;
  check_dtype(codes, ScalarType::Char, name);
  return false;
}

Tensor integer_group_matmul(const Tensor& a_, const Tensor& a_scale, const Tensor& w_,
                            const Tensor& multiplier, const Tensor& w_scale,
                            const std::optional<Tensor>& bias, int64_t group_size,
                            ScalarType dtype) {
  check_cuda(a_, "a");
  check_min_dim(a_, 1, "a");
  check_dim(w_, 2, "w");
  check_dim(multiplier, 2, "w_multiplier");
  STD_TORCH_CHECK(group_size > 0, "group_size: expected a positive size, got ", group_size);
  LlmqatInt4Linear p{};
  p.a_packed = is_packed(a_, "a");
  p.w_packed = is_packed(w_, "w");
  p.n = w_.size(0);
  STD_TORCH_CHECK(multiplier.size(1) <= kMaxIntegerGroupK / group_size,
                  "w_multiplier: ", multiplier.size(1), " groups of ", group_size,
                  " could overflow int32; at most K = ", kMaxIntegerGroupK);
  p.k = multiplier.size(1) * group_size;
  p.group_size = group_size;
  const int64_t packed_k = (p.k + 1) / 2, a_columns = p.a_packed ? packed_k : p.k;
  STD_TORCH_CHECK(a_.size(a_.dim() - 1) == a_columns, "a: expected ", a_columns, " columns for ",
                  p.k, " features in groups of ", group_size, ", got ", a_.size(a_.dim() - 1));
  p.m = 1;
  for (int64_t d = 0; d + 1 < a_.dim(); ++d) p.m *= a_.size(d);

  const torch::stable::accelerator::DeviceGuard guard(a_.get_device_index());
  const Tensor a = as_contiguous(a_);
  const Tensor w = operand(w_, a, w_.scalar_type(), {-1, p.w_packed ? packed_k : p.k}, "w");
  const Tensor m = operand(multiplier, a, ScalarType::Byte, {p.n, -1}, "w_multiplier");
  const Tensor sw = operand(w_scale, a, ScalarType::Float, {p.n}, "w_scale");
  check_cuda(a_scale, "a_scale");
  check_dtype(a_scale, ScalarType::Float, "a_scale");
  STD_TORCH_CHECK(a_scale.get_device_index() == a.get_device_index() && a_scale.numel() == p.m,
                  "a_scale: expected one value a row (", p.m, ") on the device of a");
  const Tensor sx = as_contiguous(a_scale);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    p.bias_dtype = cuda_dtype(bias->scalar_type(), "bias");
    b = operand(*bias, a, bias->scalar_type(), {p.n}, "bias");
    p.bias = b->const_data_ptr();
  }
  p.dtype = cuda_dtype(dtype, "dtype");
  std::vector<int64_t> sizes = sizes_of(a);
  sizes.back() = p.n;
  Tensor y = new_empty(a, sizes, dtype);
  p.a = a.const_data_ptr();
  p.a_scale = data<float>(sx);
  p.w = w.const_data_ptr();
  p.multiplier = data<uint8_t>(m);
  p.w_scale = data<float>(sw);
  p.y = y.mutable_data_ptr();

  int64_t sms = 0;
  check_launch(llmqat_cuda_multiprocessors(&sms), "integer_group_matmul");
  const Int4Plan plan = int4_plan(p.m, p.n, p.k, llmqat_cuda_int4_is_regular(&p), sms);
  p.token_tile = plan.token_tile;
  p.splits = plan.splits;
  std::optional<Tensor> workspace, tickets;
  if (plan.splits > 1) {
    workspace = new_empty(a, {int4_workspace_bytes(plan)}, ScalarType::Byte);
    const int64_t count[] = {plan.tiles};
    tickets = torch::stable::new_zeros(a, IntHeaderOnlyArrayRef(count, 1), ScalarType::Int);
    p.workspace = static_cast<int32_t*>(workspace->mutable_data_ptr());
    p.tickets = static_cast<uint32_t*>(tickets->mutable_data_ptr());
  }
  check_launch(llmqat_cuda_int4_linear(&p, current_cuda_stream(a.get_device_index())),
               "integer_group_matmul");
  return y;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cuda, m) {
  m.def(
      "integer_group_matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_multiplier, Tensor "
      "w_scale, Tensor? bias, int group_size, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cuda, CUDA, m) {
  m.impl("integer_group_matmul", TORCH_BOX(&llmqat::bindings::integer_group_matmul));
}
