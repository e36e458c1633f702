// ldmatrix and mma.sync: the fragment layouts of the PTX manual.
//
// With group = lane / 4 and quad = lane % 4, register r of a lane holds
//   A (16 x K): row group + 8 * (r & 1), 32 bits from column (quad + 4 * (r >> 1)) * values
//   B (K x 8):  column group, 32 bits from row (quad + 4 * r) * values
//   acc (16 x 8): row group + 8 * (r >> 1), column 2 * quad + (r & 1)
// where `values` is how many elements 32 bits hold, and element 0 is low.
//
// Float products are exact; sums are fp32 in the order of k. The device adds in another order with
// fewer bits kept, so kernels on it are held to an error bound, not to these bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"
#include "warp.h"

namespace llmqat {
namespace emulated {

// Most of a test's time goes by here: fast code in an unoptimized build too. (GCC; others ignore
// it.)
#if defined(__GNUC__) && !defined(__clang__)
#define LLMQAT_EMULATED_HOT __attribute__((optimize("O3"), no_sanitize("undefined")))
#else
#define LLMQAT_EMULATED_HOT
#endif

// How 32 bits become elements of a type that multiplies.
struct S8 {
  using Value = int16_t;
  static constexpr int kValues = 4;
  LLMQAT_EMULATED_HOT static void unpack(uint32_t word, Value* to) {
    int8_t bytes[kValues];
    std::memcpy(bytes, &word, sizeof bytes);
    for (int i = 0; i < kValues; ++i) to[i] = bytes[i];
  }
};

struct S4 {
  using Value = int16_t;
  static constexpr int kValues = 8;
  LLMQAT_EMULATED_HOT static void unpack(uint32_t word, Value* to) {
    for (int i = 0; i < kValues; ++i) {
      const int bits = static_cast<int>(word >> (4 * i) & 15);
      to[i] = static_cast<Value>((bits ^ 8) - 8);
    }
  }
};

struct F16 {
  using Value = float;
  static constexpr int kValues = 2;
  static void unpack(uint32_t word, Value* to) {
    to[0] = to_float(fp16{static_cast<uint16_t>(word)});
    to[1] = to_float(fp16{static_cast<uint16_t>(word >> 16)});
  }
};

struct Bf16 {
  using Value = float;
  static constexpr int kValues = 2;
  static void unpack(uint32_t word, Value* to) {
    to[0] = bits_float(word << 16);
    to[1] = bits_float(word & 0xFFFF0000u);
  }
};

template <class Acc>
struct Mma {
  Acc (&acc)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

// Integers wrap.
inline uint32_t sum_of(int32_t v) { return static_cast<uint32_t>(v); }
inline float sum_of(float v) { return v; }

template <class Element, class Acc>
LLMQAT_EMULATED_HOT void multiply_fragments(Mma<Acc>* const* lanes) {
  using Value = typename Element::Value;
  constexpr int kValues = Element::kValues, kK = 8 * kValues;
  Value left[16][kK], right[8][kK];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned group = lane / 4, quad = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      Element::unpack(lanes[lane]->a[r],
                      &left[group + 8 * (r & 1)][(quad + 4 * (r >> 1)) * kValues]);
    }
    for (unsigned r = 0; r < 2; ++r) {
      Element::unpack(lanes[lane]->b[r], &right[group][(quad + 4 * r) * kValues]);
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned group = lane / 4, quad = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      const Value* x = left[group + 8 * (r >> 1)];
      const Value* y = right[2 * quad + (r & 1)];
      auto sum = sum_of(lanes[lane]->acc[r]);
      for (int k = 0; k < kK; ++k) sum += static_cast<decltype(sum)>(x[k] * y[k]);
      lanes[lane]->acc[r] = static_cast<Acc>(sum);
    }
  }
}

template <class Element, class Acc>
void mma(Acc (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name,
         Site site) {
  Mma<Acc> mine{acc, a, b};
  collective(mine, name, site, [](auto& lanes) { multiply_fragments<Element, Acc>(lanes); });
}

struct MatrixRow {
  const unsigned char* row;
  uint32_t* r;
};

// kMatrices of 8 rows of 16 bytes; lane i gives row i % 8 of matrix i / 8.
template <int kMatrices, bool kTransposed>
void ldmatrix(uint32_t* r, const void* row, const char* name, Site site) {
  MatrixRow mine{static_cast<const unsigned char*>(row), r};
  if (my_lane() < 8 * kMatrices) {
    check_aligned(row, 16, name, site);
    check_shared(row, 16, name, site);
  }
  collective(mine, name, site, [](auto& lanes) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned group = lane / 4, quad = lane % 4;
      for (unsigned m = 0; m < kMatrices; ++m) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; ++e) {
          const unsigned i = kTransposed ? 2 * quad + e : group;
          const unsigned j = kTransposed ? group : 2 * quad + e;
          std::memcpy(&pair[e], lanes[8 * m + i]->row + 2 * j, 2);
        }
        lanes[lane]->r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        emulated::Site site = emulated::Site::current()) {
  emulated::ldmatrix<4, false>(r, row, "ldmatrix_x4", site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row,
                        emulated::Site site = emulated::Site::current()) {
  emulated::ldmatrix<2, false>(r, row, "ldmatrix_x2", site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              emulated::Site site = emulated::Site::current()) {
  emulated::ldmatrix<4, true>(r, row, "ldmatrix_x4_trans", site);
}

inline void mma_m16n8k32_s8(int32_t (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulated::Site site = emulated::Site::current()) {
  emulated::mma<emulated::S8>(acc, a, b, "mma_m16n8k32_s8", site);
}

#if LLMQAT_HAS_INT4_MMA
inline void mma_m16n8k64_s4(int32_t (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulated::Site site = emulated::Site::current()) {
  emulated::mma<emulated::S4>(acc, a, b, "mma_m16n8k64_s4", site);
}
#endif

inline void mma_m16n8k16_f16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulated::Site site = emulated::Site::current()) {
  emulated::mma<emulated::F16>(acc, a, b, "mma_m16n8k16_f16", site);
}

inline void mma_m16n8k16_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              emulated::Site site = emulated::Site::current()) {
  emulated::mma<emulated::Bf16>(acc, a, b, "mma_m16n8k16_bf16", site);
}

}  // namespace llmqat
