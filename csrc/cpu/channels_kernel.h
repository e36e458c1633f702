// The two passes over rows, written once; channels.cpp compiles them per instruction set. No
// include guard on purpose.

// Plain integer operations: the compiler vectorizes them for the instruction set.
template <class T>
LLMQAT_SIMD void raise_magnitudes(const T* x, int64_t n, Magnitude<T>* top) {
  for (int64_t i = 0; i < n; ++i) {
    const Magnitude<T> m = static_cast<Magnitude<T>>(stored_magnitude(x[i]));
    top[i] = m > top[i] ? m : top[i];
  }
}

template <class T>
LLMQAT_SIMD void fake_quantize_columns(const T* x, const float* inv, const float* scale, int64_t n,
                                       float limit, T* y) {
  const F low = set(-limit), high = set(limit), magic = set(kRoundMagic);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F position = mul(load_first(x + i, n - i), load_first(inv + i, n - i));
    const F code = sub(add(min(max(position, low), high), magic), magic);
    store_first(y + i, n - i, mul(code, load_first(scale + i, n - i)));
  }
}
