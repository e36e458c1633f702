// The two-softmax row, written once; distillation.cpp compiles it per instruction set. No include
// guard on purpose.

inline constexpr int64_t kFlush = 1024;  // fp32 partial sums of so many values go to fp64

LLMQAT_SIMD float row_max(const float* x, int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F top = set(lowest);
  for (int64_t i = 0; i < n; i += kLanes)
    top = max(top, first_or(load_first(x + i, n - i), n - i, lowest));
  return max_lane(top);
}

LLMQAT_SIMD double soft_cross_entropy_row(float* student, const float* teacher, int64_t n,
                                          float inv_n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const F student_max = set(row_max(student, n)), teacher_max = set(row_max(teacher, n));
  double student_sum = 0.0, teacher_sum = 0.0, cross_sum = 0.0;
  for (int64_t block = 0; block < n; block += kFlush) {
    const int64_t end = block + kFlush < n ? block + kFlush : n;
    F student_part = set(0.0f), teacher_part = set(0.0f), cross_part = set(0.0f);
    for (int64_t i = block; i < end; i += kLanes) {
      const F s = sub(first_or(load_first(student + i, end - i), end - i, lowest), student_max);
      const F t =
          exp(sub(first_or(load_first(teacher + i, end - i), end - i, lowest), teacher_max));
      const F e = exp(s);
      store_first(student + i, end - i, e);
      student_part = add(student_part, e);
      teacher_part = add(teacher_part, t);
      // 0 * -inf of a padded vocabulary entry counts as 0.
      cross_part = add(cross_part, where_positive(t, mul(t, s)));
    }
    student_sum += sum(student_part);
    teacher_sum += sum(teacher_part);
    cross_sum += sum(cross_part);
  }
  const F student_weight = set(static_cast<float>(inv_n / student_sum));
  const F teacher_weight = set(static_cast<float>(inv_n / teacher_sum));
  for (int64_t i = 0; i < n; i += kLanes) {
    const F t = exp(sub(load_first(teacher + i, n - i), teacher_max));
    const F e = load_first(student + i, n - i);
    store_first(student + i, n - i, sub(mul(e, student_weight), mul(t, teacher_weight)));
  }
  return std::log(student_sum) - cross_sum / teacher_sum;
}
