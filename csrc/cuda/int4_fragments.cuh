// Fragments of 4-bit codes for the tensor cores, from packed rows in shared memory.
//
// A tile in shared memory has rows of 16-byte pieces, row-major as in global memory (spec 8); the
// piece index is XORed with the row, so that the eight rows that ldmatrix reads at once lie in
// different banks. ldmatrix then delivers exactly what mma.m16n8k64.s4 takes.
//
// Where there is no 4-bit MMA, a register of eight codes becomes two of int8, even and odd columns:
// (r << 4) & 0xF0F0F0F0 and r & 0xF0F0F0F0, which are 16 times the codes. A product is then 16 (one
// side) or 256 times too large; kShift takes that out of the sum of a group, exactly.
#pragma once

#include <cstdint>

#include "llmqat/arch.cuh"

namespace llmqat {

inline constexpr int kPieceBytes = 16;
inline constexpr uint32_t kHighNibbles = 0xF0F0F0F0u;

// Operands of one MMA step of 64 k: one register set for 4-bit MMA, else even and odd columns.
template <bool kInt8Tokens>
struct Int4Math {
  static constexpr bool kInt4Mma = LLMQAT_HAS_INT4_MMA && !kInt8Tokens;
  static constexpr int kPlanes = kInt4Mma ? 1 : 2;
  static constexpr int kShift = kInt4Mma ? 0 : kInt8Tokens ? 4 : 8;

  struct Weights {
    uint32_t v[kPlanes][4];
  };
  struct Tokens {
    uint32_t v[kPlanes][2];
  };

  // Adds the product of 16 channels and 8 tokens.
  static LLMQAT_DEVICE void multiply(int32_t (&sum)[4], const Weights& w, const Tokens& a) {
#if LLMQAT_HAS_INT4_MMA
    if constexpr (kInt4Mma) {
      mma_m16n8k64_s4(sum, w.v[0], a.v[0]);
      return;
    }
#endif
    if constexpr (!kInt4Mma) {
      mma_m16n8k32_s8(sum, w.v[0], a.v[0]);
      mma_m16n8k32_s8(sum, w.v[1], a.v[1]);
    }
  }
};

template <int kPlanes, int kRegisters>
LLMQAT_DEVICE void split_planes(const uint32_t (&raw)[kRegisters],
                                uint32_t (&planes)[kPlanes][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (kPlanes == 1) {
      planes[0][i] = raw[i];
    } else {
      planes[0][i] = (raw[i] << 4) & kHighNibbles;
      planes[1][i] = raw[i] & kHighNibbles;
    }
  }
}

// Byte of a piece in a tile of packed rows: 8 pieces a row.
LLMQAT_DEVICE int packed_place(int row, int piece) {
  return (row * 8 + (piece ^ (row & 7))) * kPieceBytes;
}

// The same for rows of int8, 16 pieces each: a read takes two neighbours of four rows at once.
LLMQAT_DEVICE int int8_place(int row, int piece) {
  return (row * 16 + (piece ^ ((row & 3) << 1))) * kPieceBytes;
}

// 16 channels from `row`, the 64 k of `step`.
template <class Math>
LLMQAT_DEVICE void load_weights(typename Math::Weights& w, const unsigned char* tile, int row,
                                int step, int lane) {
  uint32_t raw[4];  // channels 0-7 and 8-15 of the first 32 k, then of the second
  ldmatrix_x4(raw, tile + packed_place(row + lane % 16, 2 * step + lane / 16));
  split_planes<Math::kPlanes>(raw, w.v);
}

// 8 packed tokens from `row`. Lanes 16 to 31 give addresses that ldmatrix_x2 does not read.
template <class Math>
LLMQAT_DEVICE void load_packed_tokens(typename Math::Tokens& a, const unsigned char* tile, int row,
                                      int step, int lane) {
  uint32_t raw[2];
  ldmatrix_x2(raw, tile + packed_place(row + lane % 8, 2 * step + lane / 8 % 2));
  split_planes<Math::kPlanes>(raw, a.v);
}

// 16 packed tokens from `row`.
template <class Math>
LLMQAT_DEVICE void load_packed_tokens(typename Math::Tokens& a0, typename Math::Tokens& a1,
                                      const unsigned char* tile, int row, int step, int lane) {
  uint32_t raw[4];
  ldmatrix_x4(raw, tile + packed_place(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  const uint32_t first[2] = {raw[0], raw[1]}, second[2] = {raw[2], raw[3]};
  split_planes<Math::kPlanes>(first, a0.v);
  split_planes<Math::kPlanes>(second, a1.v);
}

// 8 int8 tokens from `row`: a lane's eight neighbours in k, taken apart as the weights are.
template <class Math>
LLMQAT_DEVICE void load_int8_tokens(typename Math::Tokens& a, const unsigned char* tile, int row,
                                    int step, int lane) {
  struct alignas(8) Word2 {
    uint32_t v[2];
  };
  const int quarter = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int piece = 4 * step + 2 * half + quarter / 2;
    const auto* at = tile + int8_place(row + lane / 4, piece) + quarter % 2 * 8;
    const Word2 codes = *reinterpret_cast<const Word2*>(at);
    a.v[0][half] = byte_permute(codes.v[0], codes.v[1], 0x6420);
    a.v[1][half] = byte_permute(codes.v[0], codes.v[1], 0x7531);
  }
}

}  // namespace llmqat
