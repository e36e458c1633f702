// Bounds of the logits by groups, written once; screened_argmax.cpp compiles it per instruction
// set. No include guard on purpose.

// Groups [begin, end) of n logits; high and low are the two parts of the approximation.
LLMQAT_SIMD void bound_groups(const ScreenRow& row, int64_t n, int64_t begin, int64_t end,
                              GroupBound* out) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const F a = set(row.a), b = set(row.b), c = set(row.c);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = g * kScreenGroup;
    const int64_t last = first + kScreenGroup < n ? first + kScreenGroup : n;
    F upper = set(lowest), lower = set(lowest), size = set(0.0f), all = set(0.0f);
    for (int64_t v = first; v < last; v += kLanes) {
      const int64_t left = last - v;
      const F norm = load_first(row.row_norms + v, left);
      const F error = load_first(row.error_norms + v, left);
      const F approx = add(load_first(row.high + v, left), load_first(row.low + v, left));
      const F bound = add(add(mul(a, norm), mul(b, error)), c);
      const F top = add(approx, bound), bottom = sub(approx, bound);
      all = add(all, first_or(add(sub(top, top), sub(bottom, bottom)), left, 0.0f));
      upper = max(upper, first_or(top, left, lowest));
      lower = max(lower, first_or(bottom, left, lowest));
      size = max(size, first_or(add(norm, error), left, 0.0f));
    }
    out[g] = {max_lane(upper), max_lane(lower), max_lane(size), !any_nan(all)};
  }
}
