// The greedy token without the logits: an 8-bit screen of the head names the few rows that can hold
// the largest logit, and only those are computed.
//
// Math:    spec 16 (greedy) of the float_matmul logits (spec 17). x the hidden row, w_v a head row,
//          screen row s_v c_v = w_v - d_v; x = X1 + X2 + r, X1 = 8-bit codes of x, X2 = 8-bit codes
//          of x - X1 (with one part, the outliers of x leave an r that lets half the rows through).
//            approx_v = X1.(s_v c_v) + X2.(s_v c_v)                   integer product, spec 7
//            x.w_v - (X1 + X2).(s_v c_v) = r.w_v + (X1 + X2).d_v      and by Cauchy-Schwarz
//            |logit_v - approx_v| <= bound_v = a |w_v| + b |d_v| + c  with u = 2^-24,
//            a = |r| + gamma |x| + 16 u (|X1| + |X2|),  gamma = m u / (1 - m u),
//            b = |X1 + X2| + 16 u (|X1| + |X2|),        m = min(K, 128) + ceil(K / 128).
//          gamma is the rounding of the blocked FMA sum. 16 u: two products of three roundings, at
//          most (|X1| + |X2|) (|w_v| + |d_v|), their sum, and approx +- bound. a and b are then
//          raised by 2^-18 (norms in fp64, bound_v in fp32); c = 2^-80 covers underflow anywhere.
//          A row whose approx + bound lies below every value that rounds to the d-rounded
//          max(approx - bound) has a smaller logit of dtype d; the others are candidates.
// Shapes:  hidden [rows, K]; head in float panels [N, K]; screen in panels8 [N, K], scale [N];
//          row_norms >= |w_v|, error_norms >= |d_v|, both [N] and >= 2^-60; tokens [rows].
// Tiling:  6 rows a pass are the 12 of an integer tile; bounds by groups of 64 rows.
// Cost:    reads N*K bytes and some panels of the head instead of the head (2 or 4 N*K).
// Numerics: exact: the token of the full product. Candidate logits have its bits (spec 17).
// Edges:   whatever the bound does not cover (NaN, Inf, sums near 2^126, a winner that is not
//          finite, candidates in half the panels) takes the full product. N = 0: -1.
// Limits:  K <= 131071.
// Tests:   tests/kernels/test_screened_argmax_native.py
#pragma once

#include <cstdint>

#include "parallel.h"
#include "repack.h"

namespace llmqat::cpu {

struct ScreenedHead {
  int64_t n, k;
  const void* head;  // panels behind the header
  Layout layout;     // of the head: panels_f32 or panels_bf16
  const void* screen;
  const float* scale;
  const float* row_norms;
  const float* error_norms;
};

// tokens [rows]: the greedy token or -1 (spec 16). candidates [rows]: how many logits were computed
// for it; n where all were. T, the dtype of the logits, is float, llmqat::bf16 or llmqat::fp16.
template <class T>
void screened_argmax(const Parallel& parallel, const ScreenedHead& head, const T* hidden,
                     int64_t rows, int64_t* tokens, int64_t* candidates);

}  // namespace llmqat::cpu
