// Where a weight code lies in the layout that the CUDA linears read: spec 8 and 25. Host and
// device, pure index arithmetic; a permutation of the row-major codes, with its inverse.
//
// mma.m16n8k32 takes the weights as its 16-row side. Lane 4 * group + quarter of a warp holds 16
// bytes of them: rows group and group + 8, columns 4 * quarter .. + 3 of each half of the 32. The
// layout is those bytes in the order in which lanes load them, so that one 16-byte load is one
// fragment. Which k a column of the fragment stands for is free, as long as the activations use the
// same order: a lane's columns are neighbours in k, so that a 16-byte load of activations serves
// two fragments. Which channel a row stands for is free too: row and row + 8 are neighbours, so
// that a thread ends up with pairs of results that lie side by side.
//
// A tile is 32 channels: kTileRows of the first half of the N channels and the same of the second,
// so that the gate and the up projection of one index, stacked as [gate; up], meet in one thread.
// 4-bit: a byte is (code of the first half << 4) | (code of the second half + 8).
// 8-bit: loads alternate between the halves.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

inline constexpr int kTileRows = 16;   // MMA rows: channels of one half in a tile
inline constexpr int kBlockK = 128;    // k of one block of a tile; K is padded to whole blocks
inline constexpr int kLoadBytes = 16;  // what a lane loads at once
inline constexpr int kFragmentBytes = 32 * kLoadBytes;  // one load of a warp
inline constexpr int kFragmentK = 32;                   // k of one fragment
// Behind the codes, so that no other backend's layout of the same weight has the same size.
inline constexpr int kTagBytes = 16;
inline constexpr uint32_t kTag0 = 0x716D6C6C, kTag1 = 0x66207461, kTag2 = 0x6D676172,
                          kTag3 = 0x73746E65;  // "llmqat fragments"

// A byte of the layout, and which 4 bits of it hold the code (-1: the whole byte).
struct PackedPlace {
  int64_t byte;
  int high;  // 1: high nibble, two's complement; 0: low nibble, code + 8; -1: int8
};

// A code of the weight; beyond N or K where the layout is padded.
struct CodePlace {
  int64_t channel;
  int64_t column;
};

// Channels of the first half; the second has as many or one less.
LLMQAT_HD int64_t half_channels(int64_t n) { return (n + 1) / 2; }

LLMQAT_HD int64_t layout_tiles(int64_t n) { return (half_channels(n) + kTileRows - 1) / kTileRows; }

// At least one, so that a lane can always load something.
LLMQAT_HD int64_t layout_blocks(int64_t k) { return k == 0 ? 1 : (k + kBlockK - 1) / kBlockK; }

// Loads of a warp for one block: four fragments of 4-bit pairs, or twice four of int8.
LLMQAT_HD int block_loads(bool nibbles) { return (nibbles ? 1 : 2) * (kBlockK / kFragmentK); }

LLMQAT_HD int64_t block_bytes(bool nibbles) {
  return static_cast<int64_t>(block_loads(nibbles)) * kFragmentBytes;
}

// Without the tag.
LLMQAT_HD int64_t layout_bytes(bool nibbles, int64_t n, int64_t k) {
  return layout_tiles(n) * layout_blocks(k) * block_bytes(nibbles);
}

// Code w[channel, column] of a weight [n, k].
LLMQAT_HD PackedPlace packed_place(bool nibbles, int64_t n, int64_t k, int64_t channel,
                                   int64_t column) {
  const int64_t half = half_channels(n);
  const int second = channel >= half ? 1 : 0;
  const int64_t in_half = channel - second * half;
  const int row = static_cast<int>(in_half % kTileRows);
  const int in_block = static_cast<int>(column % kBlockK);
  const int fragment = in_block / 64 * 2 + in_block / 8 % 2;
  const int lane = row / 2 * 4 + in_block % 64 / 16;
  const int word = in_block / 4 % 2 * 2 + row % 2;
  const int load = nibbles ? fragment : 2 * fragment + second;
  const int64_t block = in_half / kTileRows * layout_blocks(k) + column / kBlockK;
  return {block * block_bytes(nibbles) + load * kFragmentBytes + lane * kLoadBytes + word * 4 +
              column % 4,
          nibbles ? 1 - second : -1};
}

// The inverse. high as in PackedPlace (not read for 8 bits).
LLMQAT_HD CodePlace code_place(bool nibbles, int64_t n, int64_t k, int64_t byte, int high) {
  const int64_t block = byte / block_bytes(nibbles);
  const int at = static_cast<int>(byte % block_bytes(nibbles));
  const int load = at / kFragmentBytes, lane = at / kLoadBytes % 32, word = at / 4 % 4;
  const int fragment = nibbles ? load : load / 2;
  const int second = nibbles ? 1 - high : load % 2;
  const int64_t row = block / layout_blocks(k) * kTileRows + lane / 4 * 2 + word % 2;
  // A padded row of the first half is no channel, though its number is one of the second half.
  const int64_t channel = row < half_channels(n) ? second * half_channels(n) + row : n;
  return {channel, block % layout_blocks(k) * kBlockK + fragment / 2 * 64 + lane % 4 * 16 +
                       fragment % 2 * 8 + word / 2 * 4 + at % 4};
}

}  // namespace llmqat
