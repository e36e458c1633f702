// Sampling of one token from one row of logits on the CPU.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat::cpu {

struct SampleRow {
  int64_t record;
  int64_t step;
  int64_t seed;
  float temperature;  // > 0
  int64_t top_k;      // 0: all
  bool greedy;
};

// Floats of scratch for a vocabulary: the maximum of each group of 64 logits.
inline int64_t sample_scratch(int64_t vocabulary) { return (vocabulary + 63) / 64; }

// The token, or -1 (spec 16). T is float, llmqat::bf16 or llmqat::fp16. vocabulary < 2^32.
template <class T>
int64_t sample_row(const T* logits, int64_t vocabulary, const SampleRow& row, float* scratch);

}  // namespace llmqat::cpu
