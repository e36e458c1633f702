// Soft cross entropy of one row of logits on the CPU.
#pragma once

#include <cstdint>

namespace llmqat::cpu {

// Loss of one token (unweighted); student becomes its gradient times inv_n (spec 10). vocabulary
// >= 1.
double soft_cross_entropy_row(float* student, const float* teacher, int64_t vocabulary,
                              float inv_n);

}  // namespace llmqat::cpu
