// Channel groups over tokens: fake_quantize_channels.
#include "cpu/channels.h"

#include "checks.h"

namespace llmqat::bindings {
namespace {

Tensor fake_quantize_channels(const Tensor& x_, int64_t bits, int64_t group_size,
                              std::optional<double> /*ste_clip: only the gradient's*/) {
  check_cpu(x_, "x");
  check_bits(bits, "bits");
  check_min_dim(x_, 1, "x");
  const int64_t columns = x_.size(x_.dim() - 1);
  STD_TORCH_CHECK(group_size > 0, "group_size: expected a positive size, got ", group_size);
  check_group_size(group_size, columns, "group_size");
  const Tensor x = as_contiguous(x_);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  if (x.numel() == 0) return y;
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    cpu::fake_quantize_channels(torch_threads(), data<T>(x), x.numel() / columns, columns,
                                group_size, static_cast<int>(bits), mutable_data<T>(y));
  });
  return y;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def(
      "fake_quantize_channels(Tensor x, int bits, int group_size, float? ste_clip=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("fake_quantize_channels", TORCH_BOX(&llmqat::bindings::fake_quantize_channels));
}
