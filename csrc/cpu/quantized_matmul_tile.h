// The last steps of a matmul tile: scales, group sums, bias, cast (spec 7). Shared by the float
// matmul.
//
// Math:    scale: out = mul(float(acc), mul(sx[r], sw[c])), or out += that for later groups. store:
//          y = cast(add(in, bias[c])). All fp32, each operation rounded, no contraction. weigh:
//          out = acc * m[c], or out += that for later groups, exact int32 (spec 18).
// Shapes:  acc, in, out [rows, ld] in L1, cols <= ld used; y [rows, cols] with its own row stride.
// Tests:   tests/kernels/test_matmul_native.py
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "llmqat/quant_math.h"

namespace llmqat::cpu {

enum class OutType { int32, float32, bfloat16, float16 };

template <class T>
constexpr OutType out_type_of() {
  return std::is_same_v<T, bf16>   ? OutType::bfloat16
         : std::is_same_v<T, fp16> ? OutType::float16
                                   : OutType::float32;
}

inline int64_t out_bytes(OutType type) {
  return type == OutType::bfloat16 || type == OutType::float16 ? 2 : 4;
}

struct TileEnd {
  // out and acc do not overlap.
  void (*scale)(const int32_t* acc, int64_t ld, int rows, int cols, const float* sx,
                const float* sw, bool first, float* out);
  void (*weigh)(const int32_t* acc, int64_t ld, int rows, int cols, const int32_t* multiplier,
                bool first, int32_t* out);
  void (*store)(const float* in, int64_t ld, int rows, int cols, const float* bias, OutType type,
                void* y, int64_t ldy);
};

const TileEnd& tile_end(Isa isa);

}  // namespace llmqat::cpu
