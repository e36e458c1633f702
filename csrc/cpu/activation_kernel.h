// The SiLU row, written once; activation.cpp compiles it per instruction set. No include guard on
// purpose.

template <class T>
LLMQAT_SIMD void silu_mul_row(const T* gate, const T* up, int64_t n, T* y) {
  const F one = set(1.0f), minus_zero = set(-0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F g = load_first(gate + i, n - i);
    const F silu = round_as<T>(div(g, add(one, exp(sub(minus_zero, g)))));
    store_first(y + i, n - i, mul(silu, load_first(up + i, n - i)));
  }
}
