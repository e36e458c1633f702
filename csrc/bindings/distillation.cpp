// The distillation loss: torch's GEMMs around one fused pass over each chunk of logits.
#include "cpu/distillation.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "checks.h"

namespace llmqat::bindings {
namespace {

// Spec 10 on one chunk: returns the loss; student [C, V] fp32, contiguous, becomes its gradient.
double chunk_loss(const Tensor& student, const Tensor& teacher, const bool* valid, float inv_n) {
  const int64_t rows = student.size(0), vocabulary = student.size(1);
  float* to = mutable_data<float>(student);
  const float* from = data<float>(teacher);
  std::vector<double> losses(static_cast<size_t>(rows), 0.0);
  parallel_rows(rows, vocabulary * 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = to + r * vocabulary;
      if (valid != nullptr && !valid[r]) {
        std::fill_n(row, vocabulary, 0.0f);
      } else {
        losses[static_cast<size_t>(r)] =
            cpu::soft_cross_entropy_row(row, from + r * vocabulary, vocabulary, inv_n);
      }
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0) * inv_n;
}

Tensor scalar_like(const Tensor& like, double value) {
  Tensor loss = empty_cpu({}, ScalarType::Float);
  *mutable_data<float>(loss) = static_cast<float>(value);
  return loss;
}

void check_valid(const std::optional<Tensor>& valid, int64_t tokens) {
  if (!valid) return;
  check_cpu(*valid, "valid");
  check_dtype(*valid, ScalarType::Bool, "valid");
  check_shape(*valid, {tokens}, "valid");
}

// In place on student_logits; the private twin of spec/distillation.py's function of this name.
Tensor soft_cross_entropy(Tensor student_logits, const Tensor& teacher_logits_,
                          std::optional<Tensor> valid_, double inv_n) {
  check_cpu(student_logits, "student_logits");
  check_cpu(teacher_logits_, "teacher_logits");
  check_dim(student_logits, 2, "student_logits");
  const int64_t rows = student_logits.size(0), vocabulary = student_logits.size(1);
  check_dtype(student_logits, ScalarType::Float, "student_logits");
  check_dtype(teacher_logits_, ScalarType::Float, "teacher_logits");
  check_contiguous(student_logits, "student_logits");
  check_shape(teacher_logits_, {rows, vocabulary}, "teacher_logits");
  check_valid(valid_, rows);
  STD_TORCH_CHECK(vocabulary > 0, "student_logits: the vocabulary is empty");
  const Tensor teacher_logits = as_contiguous(teacher_logits_);
  const Tensor valid = valid_ ? as_contiguous(*valid_) : student_logits;
  const double loss = chunk_loss(student_logits, teacher_logits,
                                 valid_ ? data<bool>(valid) : nullptr, static_cast<float>(inv_n));
  return scalar_like(student_logits, loss);
}

Tensor rows_of(const Tensor& t, int64_t start, int64_t count) {
  Tensor view = t;
  return torch::stable::narrow(view, 0, start, count);
}

// fp32, contiguous, and not t itself.
Tensor logits_of(const Tensor& hidden, const Tensor& head) {
  const Tensor logits = torch::stable::matmul(hidden, torch::stable::transpose(head, 0, 1));
  return as_contiguous(torch::stable::to(logits, ScalarType::Float));
}

void add_to(const Tensor& total, const Tensor& part_) {
  const Tensor part = as_contiguous(torch::stable::to(part_, ScalarType::Float));
  float* to = mutable_data<float>(total);
  const float* from = data<float>(part);
  parallel_rows(total.numel(), 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] += from[i];
  });
}

std::tuple<Tensor, Tensor, Tensor> distillation_loss(
    const Tensor& student_hidden, const Tensor& student_head, const Tensor& teacher_hidden,
    const Tensor& teacher_head, std::optional<Tensor> valid_, int64_t chunk_size) {
  const std::pair<const Tensor*, const char*> inputs[] = {{&student_hidden, "student_hidden"},
                                                          {&student_head, "student_head"},
                                                          {&teacher_hidden, "teacher_hidden"},
                                                          {&teacher_head, "teacher_head"}};
  for (const auto& [t, name] : inputs) {
    check_cpu(*t, name);
    check_dim(*t, 2, name);
    check_float_dtype(t->scalar_type(), name);
  }
  const int64_t tokens = student_hidden.size(0), vocabulary = student_head.size(0);
  check_dtype(student_head, student_hidden.scalar_type(), "student_head");
  check_dtype(teacher_head, teacher_hidden.scalar_type(), "teacher_head");
  check_shape(student_head, {-1, student_hidden.size(1)}, "student_head");
  check_shape(teacher_hidden, {tokens, -1}, "teacher_hidden");
  check_shape(teacher_head, {vocabulary, teacher_hidden.size(1)}, "teacher_head");
  check_valid(valid_, tokens);
  STD_TORCH_CHECK(vocabulary > 0, "student_head: the vocabulary is empty");
  STD_TORCH_CHECK(chunk_size > 0, "chunk_size: expected a positive number, got ", chunk_size);

  const Tensor valid = valid_ ? as_contiguous(*valid_) : student_hidden;
  const bool* mask = valid_ ? data<bool>(valid) : nullptr;
  const int64_t count = mask ? std::count(mask, mask + tokens, true) : tokens;
  const ScalarType dtype = student_hidden.scalar_type();
  const Tensor grad_hidden = torch::stable::new_zeros(student_hidden, student_hidden.sizes());
  Tensor grad_head =
      torch::stable::new_zeros(student_head, student_head.sizes(), ScalarType::Float);
  double loss = 0.0;
  for (int64_t start = 0; count > 0 && start < tokens; start += chunk_size) {
    const int64_t rows = std::min(chunk_size, tokens - start);
    const Tensor hidden = rows_of(student_hidden, start, rows);
    const Tensor student = logits_of(hidden, student_head);
    loss += chunk_loss(student, logits_of(rows_of(teacher_hidden, start, rows), teacher_head),
                       mask ? mask + start : nullptr, 1.0f / static_cast<float>(count));
    const Tensor gradient = torch::stable::to(student, dtype);
    Tensor target = rows_of(grad_hidden, start, rows);
    torch::stable::copy_(target, torch::stable::matmul(gradient, student_head));
    add_to(grad_head, torch::stable::matmul(torch::stable::transpose(gradient, 0, 1), hidden));
  }
  return {scalar_like(student_hidden, loss), grad_hidden, torch::stable::to(grad_head, dtype)};
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def(
      "soft_cross_entropy(Tensor(a!) student_logits, Tensor teacher_logits, Tensor? valid, float "
      "inv_n)"
      " -> Tensor");
  m.def(
      "distillation_loss(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden,"
      " Tensor teacher_head, Tensor? valid=None, int chunk_size=1024) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&llmqat::bindings::soft_cross_entropy));
  m.impl("distillation_loss", TORCH_BOX(&llmqat::bindings::distillation_loss));
}
