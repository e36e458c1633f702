// quantize on CUDA tensors.
#include <tuple>

#include "cuda_stream.h"
#include "rows_shape.h"

namespace llmqat::bindings {
namespace {

// Whether x is a matrix of dense rows, each of which is quantized: then the rows may lie apart.
bool has_dense_rows(const Tensor& x, int64_t group_size) {
  return x.dim() == 2 && group_size == -1 && x.stride(1) == 1 && x.size(0) > 1;
}

std::tuple<Tensor, Tensor> cuda_quantize(const Tensor& x_, int64_t bits, int64_t group_size,
                                         bool bf16_scale) {
  check_cuda(x_, "x");
  check_bits(bits, "bits");
  const int dtype = cuda_dtype(x_.scalar_type(), "x");
  const Rows rows = rows_of(x_, group_size, "x");
  const int32_t device = x_.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool dense = has_dense_rows(x_, group_size);
  const Tensor x = dense ? x_ : as_contiguous(x_);
  Tensor codes = new_empty(x, sizes_of(x), ScalarType::Char);
  Tensor scale = new_empty(x, scale_sizes(x, group_size), ScalarType::Float);
  check_launch(llmqat_cuda_quantize(x.const_data_ptr(), dtype, rows.count, rows.length,
                                    dense ? x.stride(0) : rows.length, static_cast<int>(bits),
                                    bf16_scale, mutable_data<int8_t>(codes),
                                    mutable_data<float>(scale), current_cuda_stream(device)),
               "quantize");
  return {codes, scale};
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cuda, m) {
  m.def(
      "quantize(Tensor x, int bits, int group_size=-1, bool bf16_scale=False) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cuda, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&llmqat::bindings::cuda_quantize));
}
