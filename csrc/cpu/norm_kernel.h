// The RMSNorm row, written once; norm.cpp compiles it per instruction set. No include guard on
// purpose.

// Adds the upper half of n values to the lower until one is left (spec 11). The padding zeros are
// not stored: x + 0 is x for the squares summed here.
LLMQAT_SIMD float tree_sum(float* x, int64_t n) {
  if (n == 0) return 0.0f;
  int64_t half = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)) / 2);
  for (; half > 0; half /= 2) {
    const int64_t pairs = n - half;
    if (half >= kLanes) {
      for (int64_t i = 0; i < pairs; i += kLanes) {
        const F low = load_first(x + i, pairs - i), high = load_first(x + i + half, pairs - i);
        store_first(x + i, pairs - i, add(low, high));
      }
    } else {
      for (int64_t i = 0; i < pairs; ++i) x[i] += x[i + half];
    }
    n = half;
  }
  return x[0];
}

template <class T>
LLMQAT_SIMD void rms_norm_row(const T* x, const T* residual, const float* weight, int64_t n,
                              float eps, T* total, T* y, float* scratch) {
  for (int64_t i = 0; i < n; i += kLanes) {
    F v = load_first(x + i, n - i);
    if (residual != nullptr) {
      v = round_as<T>(add(v, load_first(residual + i, n - i)));
      store_first(total + i, n - i, v);
    }
    store_first(scratch + i, n - i, mul(v, v));
  }
  const float mean = tree_sum(scratch, n) / static_cast<float>(n);
  const F r = set(1.0f / std::sqrt(mean + eps));
  const T* from = residual != nullptr ? total : x;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F normed = round_as<T>(mul(load_first(from + i, n - i), r));
    store_first(y + i, n - i, mul(normed, load_first(weight + i, n - i)));
  }
}
