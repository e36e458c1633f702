// Attention over one cached head, written once; attention.cpp compiles it per instruction set. No
// include guard on purpose. Every row's arithmetic is the same whatever the other rows are.

inline constexpr int kGroup = 4;  // rows that share a loaded K or V vector
inline constexpr int kSlice = 4;  // V vectors whose sums stay in registers: 4 x 4 accumulators

// Tokens that share a loaded query vector.
inline constexpr int kTokens = kLanes >= 16 ? 4 : kLanes >= 8 ? 2 : 1;

LLMQAT_SIMD inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens as fp32 rows: in the cache itself, or expanded into scratch.
struct FloatRows {
  const float* data;
  int64_t stride;
};

// Expands codes (without their scale) or 16-bit floats to fp32 rows of `padded` values.
template <class C>
LLMQAT_SIMD void expand(const C* from, int64_t row, int64_t count, int64_t head_dim, int64_t padded,
                        float* to) {
  const int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t t = 0; t < count; ++t, from += row, to += padded) {
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load_cached(from, c));
    for (int64_t c = whole; c < head_dim; ++c) to[c] = cached_value(from, c);
  }
}

// The same, rotated by the table rows of the tokens; in fp32, without rounding to q's dtype.
template <class C>
LLMQAT_SIMD void expand_rotated(const C* from, int64_t row, int64_t count, int64_t head_dim,
                                int64_t padded, const float* cos, const float* sin, float* to) {
  const int64_t half = head_dim / 2;
  const int64_t whole =
      half % kLanes == 0 ? half : 0;  // else packed nibbles may not start at a byte
  for (int64_t t = 0; t < count; ++t, from += row, to += padded, cos += half, sin += half) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      const F x1 = load_cached(from, c), x2 = load_cached(from, c + half);
      const F cosine = load(cos + c), sine = load(sin + c);
      store(to + c, sub(mul(x1, cosine), mul(x2, sine)));
      store(to + c + half, add(mul(x2, cosine), mul(x1, sine)));
    }
    for (int64_t c = whole; c < half; ++c) {
      const float x1 = cached_value(from, c), x2 = cached_value(from, c + half);
      to[c] = x1 * cos[c] - x2 * sin[c];
      to[c + half] = x2 * cos[c] + x1 * sin[c];
    }
  }
}

template <class C>
LLMQAT_SIMD FloatRows key_rows(const CachedHead<C>& cache, int64_t start, int64_t count,
                               int64_t padded, float* scratch) {
  const C* from = cache.k + start * cache.row;
  if (cache.cos != nullptr) {
    const int64_t at = start * (cache.head_dim / 2);
    expand_rotated(from, cache.row, count, cache.head_dim, padded, cache.cos + at, cache.sin + at,
                   scratch);
    return {scratch, padded};
  }
  if constexpr (std::is_same_v<C, float>) {
    if (cache.head_dim % kLanes == 0) return {from, cache.row};
  }
  expand(from, cache.row, count, cache.head_dim, padded, scratch);
  return {scratch, padded};
}

template <class C>
LLMQAT_SIMD FloatRows value_rows(const CachedHead<C>& cache, int64_t start, int64_t count,
                                 int64_t padded, float* scratch) {
  const C* from = cache.v + start * cache.row;
  if constexpr (std::is_same_v<C, float>) {
    if (cache.head_dim % kLanes == 0) return {from, cache.row};
  }
  expand(from, cache.row, count, cache.head_dim, padded, scratch);
  return {scratch, padded};
}

// scores[r][t] = q[r] . k[t] for N rows; a vector of tokens at a time, lanes past count are not
// meaningful.
template <int N>
LLMQAT_SIMD void dot(const float* q, int64_t padded, FloatRows k, int64_t count, int64_t columns,
                     float* scores) {
  for (int64_t t = 0; t < count; t += kLanes) {
    F parts[N][kLanes];
    for (int j = 0; j < kLanes; j += kTokens) {
      const float* keys[kTokens];
      for (int i = 0; i < kTokens; ++i) keys[i] = k.data + smaller(t + j + i, count - 1) * k.stride;
      F sums[N][kTokens];
      for (int r = 0; r < N; ++r) {
        for (int i = 0; i < kTokens; ++i) sums[r][i] = set(0.0f);
      }
      for (int64_t c = 0; c < columns; c += kLanes) {
        F loaded[kTokens];
        for (int i = 0; i < kTokens; ++i) loaded[i] = load(keys[i] + c);
        for (int r = 0; r < N; ++r) {
          const F query = load(q + r * padded + c);
          for (int i = 0; i < kTokens; ++i) sums[r][i] = fma(query, loaded[i], sums[r][i]);
        }
      }
      for (int r = 0; r < N; ++r) {
        for (int i = 0; i < kTokens; ++i) parts[r][j + i] = sums[r][i];
      }
    }
    for (int r = 0; r < N; ++r) store(scores + r * kAttentionBlock + t, sum_each(parts[r]));
  }
}

// sums[r][c..] += weights[r][t] * v[t][c..] over tokens [begin, end), M vectors wide, for N rows.
template <int N, int M>
LLMQAT_SIMD void accumulate_slice(const float* weights, FloatRows v, int64_t begin, int64_t end,
                                  float* sums, int64_t padded) {
  F total[N][M];
  for (int r = 0; r < N; ++r) {
    for (int m = 0; m < M; ++m) total[r][m] = load(sums + r * padded + m * kLanes);
  }
  for (int64_t t = begin; t < end; ++t) {
    const float* value = v.data + t * v.stride;
    F loaded[M];
    for (int m = 0; m < M; ++m) loaded[m] = load(value + m * kLanes);
    for (int r = 0; r < N; ++r) {
      const F weight = set(weights[r * kAttentionBlock + t]);
      for (int m = 0; m < M; ++m) total[r][m] = fma(weight, loaded[m], total[r][m]);
    }
  }
  for (int r = 0; r < N; ++r) {
    for (int m = 0; m < M; ++m) store(sums + r * padded + m * kLanes, total[r][m]);
  }
}

template <int N>
LLMQAT_SIMD void accumulate(const float* weights, FloatRows v, int64_t begin, int64_t end,
                            int64_t columns, float* sums, int64_t padded) {
  if (begin >= end) return;
  int64_t c = 0;
  for (; c + kSlice * kLanes <= columns; c += kSlice * kLanes) {
    accumulate_slice<N, kSlice>(weights, {v.data + c, v.stride}, begin, end, sums + c, padded);
  }
  for (; c < columns; c += kLanes) {
    accumulate_slice<N, 1>(weights, {v.data + c, v.stride}, begin, end, sums + c, padded);
  }
}

// Scores of one row to weights exp(score - max) * v_scale; updates the running max and sum and
// rescales what was summed before.
LLMQAT_SIMD void soften(float* scores, int64_t count, const float* k_scale, const float* v_scale,
                        float& top, float& total, float* sums, int64_t columns) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F highest = set(lowest);
  for (int64_t t = 0; t < count; t += kLanes) {
    F s = load(scores + t);
    if (k_scale != nullptr) s = mul(s, load_first(k_scale + t, count - t));
    s = first_or(s, count - t, lowest);
    highest = max(highest, s);
    store(scores + t, s);
  }
  const float block_top = max_lane(highest);
  const float new_top = block_top > top ? block_top : top;
  const float shrink = exp_f32(top - new_top);
  F block_total = set(0.0f);
  for (int64_t t = 0; t < count; t += kLanes) {
    F p = exp(sub(load(scores + t), set(new_top)));
    block_total = add(block_total, p);
    if (v_scale != nullptr) p = mul(p, load_first(v_scale + t, count - t));
    store(scores + t, p);
  }
  total = total * shrink + sum(block_total);
  top = new_top;
  if (shrink != 1.0f) {
    for (int64_t c = 0; c < columns; c += kLanes) store(sums + c, mul(load(sums + c), set(shrink)));
  }
}

LLMQAT_SIMD void dot_rows(int64_t n, const float* q, int64_t padded, FloatRows k, int64_t count,
                          int64_t columns, float* scores) {
  switch (n) {
    case 1: return dot<1>(q, padded, k, count, columns, scores);
    case 2: return dot<2>(q, padded, k, count, columns, scores);
    case 3: return dot<3>(q, padded, k, count, columns, scores);
    default: return dot<kGroup>(q, padded, k, count, columns, scores);
  }
}

LLMQAT_SIMD void accumulate_rows(int64_t n, const float* weights, FloatRows v, int64_t count,
                                 int64_t columns, float* sums, int64_t padded) {
  switch (n) {
    case 1: return accumulate<1>(weights, v, 0, count, columns, sums, padded);
    case 2: return accumulate<2>(weights, v, 0, count, columns, sums, padded);
    case 3: return accumulate<3>(weights, v, 0, count, columns, sums, padded);
    default: return accumulate<kGroup>(weights, v, 0, count, columns, sums, padded);
  }
}

template <class T, class C>
LLMQAT_SIMD void attend(const CachedHead<C>& cache, const T* q, const int64_t* offsets,
                        const int64_t* lengths, int64_t rows, float scaling, T* out,
                        float* scratch) {
  const int64_t padded = padded_head_dim(cache.head_dim);
  const int64_t columns = (cache.head_dim + kLanes - 1) / kLanes * kLanes;
  // A vector that straddles two cache lines costs two accesses.
  float* keys = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64 / sizeof(float);
  float* values = keys + kAttentionBlock * padded;
  float* queries = values + kAttentionBlock * padded;
  float* sums = queries + kAttentionRows * padded;
  float* scores = sums + kAttentionRows * padded;
  float top[kAttentionRows], total[kAttentionRows];

  if (columns != cache.head_dim) {  // zero the padding columns, once: nothing writes them again
    std::memset(keys, 0, static_cast<size_t>(2 * kAttentionBlock + rows) * padded * sizeof(float));
  }
  std::memset(sums, 0, static_cast<size_t>(rows) * padded * sizeof(float));
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    top[r] = -std::numeric_limits<float>::infinity();
    total[r] = 0.0f;
    longest = lengths[r] > longest ? lengths[r] : longest;
    for (int64_t c = 0; c < cache.head_dim; c += kLanes) {
      const F v = load_first(q + offsets[r] + c, cache.head_dim - c);
      store_first(queries + r * padded + c, cache.head_dim - c, mul(v, set(scaling)));
    }
  }

  for (int64_t start = 0; start < longest; start += kAttentionBlock) {
    const int64_t count = smaller(kAttentionBlock, longest - start);
    const FloatRows k = key_rows(cache, start, count, padded, keys);
    const FloatRows v = value_rows(cache, start, count, padded, values);
    const float* k_scale = cache.k_scale != nullptr ? cache.k_scale + start : nullptr;
    const float* v_scale = cache.v_scale != nullptr ? cache.v_scale + start : nullptr;
    for (int64_t g = 0; g < rows; g += kGroup) {
      const int64_t n = smaller(kGroup, rows - g);
      int64_t common = count;  // tokens that every row of the group sees
      dot_rows(n, queries + g * padded, padded, k, count, columns, scores);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t own = smaller(count, lengths[g + r] - start);
        common = smaller(common, own > 0 ? own : 0);
        if (own <= 0) continue;
        soften(scores + r * kAttentionBlock, own, k_scale, v_scale, top[g + r], total[g + r],
               sums + (g + r) * padded, columns);
      }
      accumulate_rows(n, scores, v, common, columns, sums + g * padded, padded);
      // The rest one row at a time: a weight of 0 must not meet a token that the row may not see.
      for (int64_t r = 0; r < n; ++r) {
        const int64_t own = smaller(count, lengths[g + r] - start);
        accumulate<1>(scores + r * kAttentionBlock, v, common, own, columns,
                      sums + (g + r) * padded, padded);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const F scale = set(lengths[r] > 0 ? 1.0f / total[r] : 0.0f);
    for (int64_t c = 0; c < cache.head_dim; c += kLanes) {
      store_first(out + offsets[r] + c, cache.head_dim - c,
                  mul(load(sums + r * padded + c), scale));
    }
  }
}
