// The greedy token of each hidden row, by an 8-bit screen of the head (cpu/screened_argmax.h).
//
// An inner operator: not in schemas.py. float_matmul and a greedy sample give the same tokens.
#include "cpu/screened_argmax.h"

#include <tuple>

#include "checks.h"
#include "cpu/quantized_matmul.h"
#include "matmul_weights.h"

namespace llmqat::bindings {
namespace {

// fp32 [n], one value a row of the head.
Tensor per_row(const Tensor& t, int64_t n, const char* name) {
  check_cpu(t, name);
  check_dtype(t, ScalarType::Float, name);
  check_shape(t, {n}, name);
  return as_contiguous(t);
}

std::tuple<Tensor, Tensor> screened_argmax(const Tensor& hidden_, const Tensor& head_,
                                           const Tensor& screen_, const Tensor& screen_scale_,
                                           const Tensor& row_norms_, const Tensor& error_norms_,
                                           int64_t n) {
  check_cpu(hidden_, "hidden");
  check_dim(hidden_, 2, "hidden");
  const int64_t rows = hidden_.size(0), k = hidden_.size(1);
  STD_TORCH_CHECK(k <= cpu::kMaxK, "hidden: K = ", k, " could overflow int32; at most ",
                  cpu::kMaxK);
  const Tensor hidden = as_contiguous(hidden_), head = as_contiguous(head_);
  const cpu::PackedHeader header = packed_header(head);
  STD_TORCH_CHECK(header.layout == Layout::panels_f32 || header.layout == Layout::panels_bf16,
                  "head: repacked from integer codes; screened_argmax takes a float head");
  STD_TORCH_CHECK(header.n == n, "n: the repacked head has ", header.n, " rows, got ", n);
  STD_TORCH_CHECK(header.k == k, "head: repacked for K = ", header.k, ", but hidden has K = ", k);
  const Weight screen = repacked(screen_, kMaxBits, n, k);
  const Tensor scale = per_row(screen_scale_, n, "screen_scale");
  const Tensor row_norms = per_row(row_norms_, n, "row_norms");
  const Tensor error_norms = per_row(error_norms_, n, "error_norms");
  Tensor tokens = empty_cpu({rows}, ScalarType::Long);
  Tensor candidates = empty_cpu({rows}, ScalarType::Long);
  const cpu::ScreenedHead screened{.n = n,
                                   .k = k,
                                   .head = data<uint8_t>(head) + cpu::kHeaderBytes,
                                   .layout = header.layout,
                                   .screen = screen.bytes,
                                   .scale = data<float>(scale),
                                   .row_norms = data<float>(row_norms),
                                   .error_norms = data<float>(error_norms)};
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    cpu::screened_argmax(torch_threads(), screened, data<decltype(tag)>(hidden), rows,
                         mutable_data<int64_t>(tokens), mutable_data<int64_t>(candidates));
  });
  return {tokens, candidates};
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  // hidden [rows, K]; head, screen: repack_weight of the float head and of its 8-bit codes, [n, K];
  // screen_scale, row_norms, error_norms fp32 [n]. Returns the tokens and how many logits of each
  // row were computed, int64 [rows].
  m.def(
      "screened_argmax(Tensor hidden, Tensor head, Tensor screen, Tensor screen_scale,"
      " Tensor row_norms, Tensor error_norms, int n) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("screened_argmax", TORCH_BOX(&llmqat::bindings::screened_argmax));
}
