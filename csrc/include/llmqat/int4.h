// Spec 8: two codes a byte. Low nibble = even column, high nibble = odd column, two's complement.
#pragma once

#include <cstdint>

#include "llmqat/quant_math.h"

namespace llmqat {

LLMQAT_HD uint8_t pack_pair(int8_t even, int8_t odd) {
  return static_cast<uint8_t>((even & 0x0F) | ((odd & 0x0F) << 4));
}

// Sign extension of a nibble: flip the sign bit, subtract it again.
LLMQAT_HD int8_t unpack_even(uint8_t byte) {
  return static_cast<int8_t>(((byte & 0x0F) ^ 0x08) - 0x08);
}

LLMQAT_HD int8_t unpack_odd(uint8_t byte) {
  return static_cast<int8_t>(((byte >> 4) ^ 0x08) - 0x08);
}

LLMQAT_HD int64_t packed_size(int64_t columns) { return (columns + 1) / 2; }

}  // namespace llmqat
