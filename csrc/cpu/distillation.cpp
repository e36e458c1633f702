// Soft cross entropy of teacher and student logits, fused with its gradient.
//
// Math:     spec 10: log(sum e^(s-ms)) - sum_v p_v (s_v - ms), p = softmax(teacher).
// Shapes:   one token's V logits a call; the caller bounds the chunk of rows that exist.
// Dtypes:   fp32 logits and gradient; block sums in fp64.
// Tiling:   blocks of 1,024 values flush fp32 lane sums to fp64, so V = 128k loses no digits.
// Cost:     three passes over 2V floats in L2 (maxima, sums, gradient), three exps a value: about
//           80 instructions for 16 values. The softmaxes themselves are never stored.
// Numerics: not exact; NaN in either row makes loss and gradient NaN.
// Edges:    -inf logits: a teacher probability of 0 contributes 0.
// Limits:   V >= 1.
// Tests:    tests/kernels/test_distillation_loss_spec.py
// Bench:    python -m benchmarks.run --op distillation_loss
#include "cpu/distillation.h"

#include <cmath>
#include <limits>

#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/distillation_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

double soft_cross_entropy_row(float* student, const float* teacher, int64_t vocabulary,
                              float inv_n) {
  LLMQAT_DISPATCH_ISA(soft_cross_entropy_row(student, teacher, vocabulary, inv_n))
}

}  // namespace llmqat::cpu
