// The vector parts of sampling, written once; sampling.cpp compiles them per instruction set. No
// include guard on purpose.

// Maximum of every group of 64 logits; false if the row has NaN or nothing finite.
template <class T>
LLMQAT_SIMD bool group_maxima(const T* logits, int64_t vocabulary, float* maxima) {
  const float lowest = -std::numeric_limits<float>::infinity();
  bool nan = false, finite = false;
  for (int64_t base = 0; base < vocabulary; base += kTokenGroup) {
    const int64_t end = base + kTokenGroup < vocabulary ? base + kTokenGroup : vocabulary;
    F top = set(lowest), all = set(0.0f);
    for (int64_t v = base; v < end; v += kLanes) {
      const F x = load_first(logits + v, end - v);
      all = add(all, sub(x, x));  // stays 0 unless a value is not finite
      top = max(top, first_or(x, end - v, lowest));
    }
    if (any_nan(all)) {  // rare: look again, at Inf and NaN apart
      for (int64_t v = base; v < end; v += kLanes) {
        const F x = first_or(load_first(logits + v, end - v), end - v, lowest);
        nan = nan || any_nan(x);
        finite = finite || any_finite(x);
      }
    } else {
      finite = true;
    }
    maxima[base / kTokenGroup] = max_lane(top);
  }
  return finite && !nan;
}

// The random words of tokens base .. base + 63: words[k * 16 + j] belongs to token base + 4 j + k
// (spec 15). Returns the largest word.
LLMQAT_SIMD uint32_t random_words(uint32_t base, const SampleRow& row, uint32_t* words) {
  U top = set_u(0);
  for (int j = 0; j < kTokenGroup / 4; j += kLanes) {
    U c0 = iota_u(base / 4 + static_cast<uint32_t>(j));
    U c1 = set_u(static_cast<uint32_t>(row.step));
    U c2 = set_u(static_cast<uint32_t>(row.record));
    U c3 = set_u(static_cast<uint32_t>(static_cast<uint64_t>(row.record) >> 32));
    uint32_t key0 = static_cast<uint32_t>(row.seed);
    uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(row.seed) >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      U high0, low0, high1, low1;
      multiply_u(c0, kPhiloxMultiplier0, high0, low0);
      multiply_u(c2, kPhiloxMultiplier1, high1, low1);
      c0 = xor_u(high1, c1, set_u(key0));
      c1 = low1;
      c2 = xor_u(high0, c3, set_u(key1));
      c3 = low0;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    store_u(words + j, c0);
    store_u(words + 16 + j, c1);
    store_u(words + 32 + j, c2);
    store_u(words + 48 + j, c3);
    top = max_u(top, max_u(max_u(c0, c1), max_u(c2, c3)));
  }
  return max_lane_u(top);
}
