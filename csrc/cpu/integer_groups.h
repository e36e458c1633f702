// quantize_integer_groups: a row in groups whose scales are integer multiples of one number.
//
// Math:     spec 18: f_g = amax_g / qmax; s = bf16(max f_g / 63); m_g = ceil(clamp(f_g / s, 1,
// 63));
//           codes of group g with the scale m_g * s, by spec 4.
// Shapes:   x, codes [rows, groups * n]; multiplier [rows, groups]; scale [rows].
// Dtypes:   T is float, llmqat::bf16 or llmqat::fp16.
// Tiling:   a row twice: its largest values, then its codes. It stays in L1/L2 in between.
// Cost:     as quantize, and two divisions a group.
// Numerics: exact, each operation rounded once; the same bits for every instruction set.
// Edges:    a group of zeros has multiplier 1 and codes 0, a row of them scale 1; a row with NaN or
//           infinity has scale NaN, multipliers 1 and codes 0.
// Tests:    tests/kernels/test_integer_groups.py, test_integer_groups_native.py
#pragma once

#include <cstdint>

#include "parallel.h"

namespace llmqat::cpu {

template <class T>
void quantize_integer_groups(const Parallel& parallel, const T* x, int64_t rows, int64_t groups,
                             int64_t n, int bits, int8_t* codes, uint8_t* multiplier, float* scale);

}  // namespace llmqat::cpu
