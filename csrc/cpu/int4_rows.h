// Packing and unpacking rows of 4-bit codes on the CPU (spec 8). Any alignment; any number of
// columns.
#pragma once

#include <cstdint>

#include "llmqat/int4.h"

namespace llmqat::cpu {

// codes[columns] -> packed[packed_size(columns)]. Only the low four bits of a code are kept.
void pack_row(const int8_t* codes, int64_t columns, uint8_t* packed);

// packed[packed_size(columns)] -> codes[columns].
void unpack_row(const uint8_t* packed, int64_t columns, int8_t* codes);

}  // namespace llmqat::cpu
