// Greedy and Gumbel-max sampling with counter-based noise.
//
// Math:     spec 15, 16. Noise is at most kNoiseBound, and noise g needs u >= 1 - e^-g, because
//           -log(u) >= 1 - u.
// Shapes:   one row of V logits a call.
// Dtypes:   fp32, bf16, fp16 logits.
// Tiling:   groups of 64 tokens = 16 Philox counters, one vector of them with AVX-512.
// Cost:     one pass for the maxima of the groups; then only groups that can still win draw their
//           words (about 2 instructions a token), and only words large enough take logarithms. The
//           group of the largest logit goes first, so that the bar is high from the start.
// Numerics: exact: what is skipped could not have won, and what is not is computed by spec 16.
// Edges:    NaN, or nothing finite: -1. Ties go to the smaller index. +Inf wins.
// Limits:   V < 2^32.
// Tests:    tests/kernels/test_sample_spec.py
// Bench:    python -m benchmarks.run --op sample
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <utility>
#include <vector>

#include "cpu/simd.h"

namespace llmqat::cpu {
namespace {

constexpr int64_t kTokenGroup = 64;
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr float kNoiseBound = 16.7f;  // the largest noise is 16.6355
constexpr int kThresholds = 17;

}  // namespace
}  // namespace llmqat::cpu

#define LLMQAT_KERNEL "cpu/sampling_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {
namespace {

template <class T>
bool group_maxima(const T* logits, int64_t vocabulary,
                  float* maxima){LLMQAT_DISPATCH_ISA(group_maxima(logits, vocabulary, maxima))}

uint32_t random_words(uint32_t base, const SampleRow& row, uint32_t* words) {
  LLMQAT_DISPATCH_ISA(random_words(base, row, words))
}

float noise(uint32_t word) {
  const float u = mul_rn(add_rn(static_cast<float>(word >> 9), 0.5f), 0x1p-23f);
  return -log_f32(-log_f32(u));
}

// A word below this cannot lift a token of logit / temperature `scaled` to the score `best`.
uint32_t word_threshold(float best, float scaled) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> words(kThresholds);
    for (int n = 0; n < kThresholds; ++n) {
      const double u = 1.0 - 1.001 * std::exp(-static_cast<double>(n));
      words[n] = u <= 0.0 ? 0u : static_cast<uint32_t>(u * 0x1p32 - 0x1p10);
    }
    return words;
  }();
  // The noise needed, less what the roundings of the score and of this difference may hide.
  const float need = (best - scaled) - (std::fabs(best) + std::fabs(scaled)) * 0x1p-22f;
  if (!(need >= 1.0f)) return 0;  // also NaN: Inf - Inf
  return table[std::min(static_cast<int>(std::min(need, 100.0f)), kThresholds - 1)];
}

// The best token so far.
struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int64_t token = -1;

  void offer(float other_score, int64_t other) {
    if (token < 0 || other_score > score || (other_score == score && other < token)) {
      score = other_score;
      token = other;
    }
  }
};

template <class T>
void sample_group(const T* logits, int64_t base, int64_t vocabulary, float maximum,
                  const SampleRow& row, Best& best) {
  const float highest = div_rn(maximum, row.temperature);
  if (best.token >= 0 && add_rn(highest, kNoiseBound) < best.score) return;
  uint32_t words[kTokenGroup];
  const uint32_t largest = random_words(static_cast<uint32_t>(base), row, words);
  const uint32_t bar = best.token >= 0 ? word_threshold(best.score, highest) : 0;
  if (largest < bar) return;
  const int64_t count = std::min(kTokenGroup, vocabulary - base);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = words[i % 4 * 16 + i / 4];
    if (word < bar) continue;
    const float scaled = div_rn(to_float(logits[base + i]), row.temperature);
    if (best.token >= 0 && word < word_threshold(best.score, scaled)) continue;
    best.offer(add_rn(scaled, noise(word)), base + i);
  }
}

template <class T>
int64_t first_largest(const T* logits, int64_t vocabulary, const float* maxima) {
  const int64_t groups = sample_scratch(vocabulary);
  const int64_t group = std::max_element(maxima, maxima + groups) - maxima;
  int64_t v = group * kTokenGroup;
  while (to_float(logits[v]) != maxima[group]) ++v;
  return v;
}

// The k largest logits, ties to the smaller index: a heap whose top is the weakest of them.
template <class T>
std::vector<std::pair<float, int64_t>> largest(const T* logits, int64_t vocabulary,
                                               const float* maxima, int64_t k) {
  const auto stronger = [](const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  std::vector<std::pair<float, int64_t>> heap;
  heap.reserve(static_cast<size_t>(k));
  for (int64_t base = 0; base < vocabulary; base += kTokenGroup) {
    const bool full = static_cast<int64_t>(heap.size()) == k;
    if (full && !(maxima[base / kTokenGroup] > heap.front().first)) continue;
    const int64_t end = std::min(base + kTokenGroup, vocabulary);
    for (int64_t v = base; v < end; ++v) {
      const float value = to_float(logits[v]);
      if (static_cast<int64_t>(heap.size()) < k) {
        heap.emplace_back(value, v);
        std::push_heap(heap.begin(), heap.end(), stronger);
      } else if (value > heap.front().first) {
        std::pop_heap(heap.begin(), heap.end(), stronger);
        heap.back() = {value, v};
        std::push_heap(heap.begin(), heap.end(), stronger);
      }
    }
  }
  return heap;
}

}  // namespace

template <class T>
int64_t sample_row(const T* logits, int64_t vocabulary, const SampleRow& row, float* scratch) {
  if (vocabulary == 0 || !group_maxima(logits, vocabulary, scratch)) return -1;
  if (row.greedy) return first_largest(logits, vocabulary, scratch);
  Best best;
  if (row.top_k > 0 && row.top_k < vocabulary) {
    uint32_t words[kTokenGroup];
    for (const auto& [logit, v] : largest(logits, vocabulary, scratch, row.top_k)) {
      const int64_t at = v % kTokenGroup;
      random_words(static_cast<uint32_t>(v - at), row, words);
      best.offer(add_rn(div_rn(logit, row.temperature), noise(words[at % 4 * 16 + at / 4])), v);
    }
    return best.token;
  }
  const int64_t groups = sample_scratch(vocabulary);
  const int64_t first = std::max_element(scratch, scratch + groups) - scratch;
  sample_group(logits, first * kTokenGroup, vocabulary, scratch[first], row, best);
  for (int64_t g = 0; g < groups; ++g) {
    if (g != first) sample_group(logits, g * kTokenGroup, vocabulary, scratch[g], row, best);
  }
  return best.token;
}

template int64_t sample_row<float>(const float*, int64_t, const SampleRow&, float*);
template int64_t sample_row<bf16>(const bf16*, int64_t, const SampleRow&, float*);
template int64_t sample_row<fp16>(const fp16*, int64_t, const SampleRow&, float*);

}  // namespace llmqat::cpu
