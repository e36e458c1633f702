// RoPE of one token, written once; rope.cpp compiles it per instruction set. No include guard on
// purpose.

template <class T>
LLMQAT_SIMD void rope_heads(const T* x, int64_t heads, int64_t head_dim, const float* cos,
                            const float* sin, T* out) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const F c = round_as<T>(load_first(cos + i, n)), s = round_as<T>(load_first(sin + i, n));
    for (int64_t h = 0; h < heads; ++h) {
      const T* head = x + h * head_dim + i;
      T* to = out + h * head_dim + i;
      const F x1 = load_first(head, n), x2 = load_first(head + half, n);
      // a + (-b) is a - b, bit for bit.
      store_first(to, n, sub(round_as<T>(mul(x1, c)), round_as<T>(mul(x2, s))));
      store_first(to + half, n, add(round_as<T>(mul(x2, c)), round_as<T>(mul(x1, s))));
    }
  }
}
