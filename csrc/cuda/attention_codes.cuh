// Integer codes of the KV cache to fp16 fragments of mma_m16n8k16, in registers.
//
// A lane's chunk is an eighth of a token's row (a quarter of a half head for K, a sixteenth part
// twice over for V): kWords words. Biased form: a code c as the fp16 denormal (c + bias) * 2^-24,
// which is its bits with zeros above, so that making it takes no arithmetic; whoever sums products
// subtracts the bias once per sum. Exact in fp32. 4-bit codes at odd nibbles stay where they are in
// the byte: 16 (c + 8) * 2^-24.
#pragma once

#include "llmqat/arch.cuh"
#include "llmqat/quant_math.h"
#include "llmqat/vec.cuh"

namespace llmqat {

inline constexpr float kDenormal = 0x1p-24f;  // the value of fp16 bit 0
inline constexpr int kAndXor = 0x6A;          // lop3: (a & b) ^ c

template <bool kPacked>
struct Codes;

template <>
struct Codes<false> {  // int8, two's complement
  // Columns of pair j of a chunk: they lie in the two halves of a word.
  LLMQAT_HD static constexpr int first_column(int j) { return 4 * (j / 2) + j % 2; }
  LLMQAT_HD static constexpr int second_column(int j) { return first_column(j) + 2; }
  // Factor of pair j in the biased form, and the bias before that factor is taken away.
  LLMQAT_HD static constexpr float factor(int) { return 1.0f; }
  LLMQAT_HD static constexpr float bias(int) { return 128.0f; }
  static constexpr float kOddFactor = 1.0f;  // of odd columns of V

  template <int kWords>
  LLMQAT_DEVICE static uint32_t biased_pair(const uint32_t (&w)[kWords], int j) {
    return column(w[j / 2], j % 2, 0u);
  }

  // The codes themselves: 1024 + 128 + code has the byte as its mantissa.
  template <int kWords>
  LLMQAT_DEVICE static uint32_t exact_pair(const uint32_t (&w)[kWords], int j) {
    return half2_sub(column(w[j / 2], j % 2, 0x64006400u), 0x64806480u);
  }

  // Tile m of V: columns 2m (rows 0..7 of the fragment) and 2m + 1 (rows 8..15), tokens s and t.
  template <int kWords>
  LLMQAT_DEVICE static void biased_column(const uint32_t (&s)[kWords], const uint32_t (&t)[kWords],
                                          int m, uint32_t& even, uint32_t& odd) {
    const uint32_t merged = byte_permute(s[m / 2], t[m / 2], m % 2 == 0 ? 0x5410u : 0x7632u);
    even = column(merged, 0, 0u);
    odd = column(merged, 1, 0u);
  }

  // Byte `at` of both halves of w, its sign bit flipped, over the bits of `high`.
  LLMQAT_DEVICE static uint32_t column(uint32_t w, int at, uint32_t high) {
    return lop3<kAndXor>(at == 0 ? w : w >> 8, 0x00FF00FFu, 0x00800080u | high);
  }
};

template <>
struct Codes<true> {  // two codes a byte, low nibble first
  LLMQAT_HD static constexpr int first_column(int j) { return 8 * (j / 4) + j % 4; }
  LLMQAT_HD static constexpr int second_column(int j) { return first_column(j) + 4; }
  LLMQAT_HD static constexpr float factor(int j) { return j % 2 == 0 ? 1.0f : 16.0f; }
  LLMQAT_HD static constexpr float bias(int) { return 8.0f; }
  static constexpr float kOddFactor = 16.0f;

  template <int kWords>
  LLMQAT_DEVICE static uint32_t biased_pair(const uint32_t (&w)[kWords], int j) {
    return column(w[j / 4], j % 4, 0u);
  }

  template <int kWords>
  LLMQAT_DEVICE static uint32_t exact_pair(const uint32_t (&w)[kWords], int j) {
    const uint32_t biased = column(w[j / 4], j % 4, 0x64006400u);
    return j % 2 == 0 ? half2_sub(biased, 0x64086408u)                // 1024 + 8 + code
                      : half2_fma(biased, 0x2C002C00u, 0xD480D480u);  // (1024 + 16 (8 + code))/16
  }

  template <int kWords>
  LLMQAT_DEVICE static void biased_column(const uint32_t (&s)[kWords], const uint32_t (&t)[kWords],
                                          int m, uint32_t& even, uint32_t& odd) {
    const uint32_t merged = byte_permute(s[m / 4], t[m / 4], m % 4 < 2 ? 0x5410u : 0x7632u);
    even = column(merged, 2 * (m % 2), 0u);
    odd = column(merged, 2 * (m % 2) + 1, 0u);
  }
  // Nibble `at` of both halves of w, its sign bit flipped, over the bits of `high`.
  LLMQAT_DEVICE static uint32_t column(uint32_t w, int at, uint32_t high) {
    const uint32_t shifted = at < 2 ? w : w >> 8;
    return at % 2 == 0 ? lop3<kAndXor>(shifted, 0x000F000Fu, 0x00080008u | high)
                       : lop3<kAndXor>(shifted, 0x00F000F0u, 0x00800080u | high);
  }
};

// kWords words of codes that are read once.
template <int kWords>
LLMQAT_DEVICE void load_codes(const uint8_t* p, uint32_t (&w)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    const Word4 loaded = load_streaming_16(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = loaded.v[i];
  } else {
    const auto loaded = load_vec<uint32_t, kWords>(reinterpret_cast<const uint32_t*>(p));
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = loaded.v[i];
  }
}

}  // namespace llmqat
