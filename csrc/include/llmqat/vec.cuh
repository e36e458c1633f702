// Vectors of kN values moved by one instruction (16 bytes at most).
#pragma once

#include <cstdint>

#include "llmqat/arch.cuh"

namespace llmqat {

template <class T, int kN>
struct alignas(sizeof(T) * kN) Vec {
  static_assert(sizeof(T) * kN <= 16, "one load moves at most 16 bytes");
  T v[kN];
};

template <class T, int kN>
LLMQAT_DEVICE Vec<T, kN> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, kN>*>(p);
}

template <class T, int kN>
LLMQAT_DEVICE void store_vec(T* p, const Vec<T, kN>& v) {
  *reinterpret_cast<Vec<T, kN>*>(p) = v;
}

}  // namespace llmqat
