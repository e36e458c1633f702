// Token sampling.
#include "cpu/sampling.h"

#include <cmath>
#include <memory>

#include "checks.h"

namespace llmqat::bindings {
namespace {

Tensor check_rows(const Tensor& t, int64_t n, ScalarType dtype, const char* name) {
  check_cpu(t, name);
  check_dtype(t, dtype, name);
  check_shape(t, {n}, name);
  return as_contiguous(t);
}

Tensor sample(const Tensor& logits_, const Tensor& record_, const Tensor& step_,
              const Tensor& greedy_, int64_t seed, double temperature, int64_t top_k) {
  check_cpu(logits_, "logits");
  check_dim(logits_, 2, "logits");
  const int64_t n = logits_.size(0), vocabulary = logits_.size(1);
  STD_TORCH_CHECK(vocabulary <= INT64_C(0xFFFFFFFF), "logits: more than 2^32 - 1 columns");
  const float t = static_cast<float>(temperature);
  STD_TORCH_CHECK(t > 0.0f && std::isfinite(t), "temperature: expected a positive number, got ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 0, "top_k: expected 0 (off) or more, got ", top_k);
  const Tensor record = check_rows(record_, n, ScalarType::Long, "record");
  const Tensor step = check_rows(step_, n, ScalarType::Long, "step");
  const Tensor greedy = check_rows(greedy_, n, ScalarType::Bool, "greedy");
  const Tensor logits = as_contiguous(logits_);
  Tensor tokens = empty_cpu({n}, ScalarType::Long);
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    parallel_rows(n, vocabulary * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
      const auto scratch = std::make_unique_for_overwrite<float[]>(cpu::sample_scratch(vocabulary));
      for (int64_t i = begin; i < end; ++i) {
        const cpu::SampleRow row{data<int64_t>(record)[i], data<int64_t>(step)[i], seed, t, top_k,
                                 data<bool>(greedy)[i]};
        mutable_data<int64_t>(tokens)[i] =
            cpu::sample_row(data<T>(logits) + i * vocabulary, vocabulary, row, scratch.get());
      }
    });
  });
  return tokens;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def(
      "sample(Tensor logits, Tensor record, Tensor step, Tensor greedy, int seed, float "
      "temperature=1.0,"
      " int top_k=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("sample", TORCH_BOX(&llmqat::bindings::sample));
}
