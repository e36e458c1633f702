// The tiles of repacked_linear.h for three instruction sets.

// gcc 12 takes the undefined registers inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cpu/repacked_linear.h"

#include <utility>

#include "cpu/code_vectors.h"
#include "cpu/float_matmul.h"
#include "cpu/simd.h"

#define LLMQAT_KERNEL "cpu/repacked_linear_kernel.h"
#include "cpu/for_each_isa.h"

namespace llmqat::cpu {

const CodeKernels& code_kernels(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return avx512::kCodeKernels;
    case Isa::avx2: return avx2::kCodeKernels;
    default: return scalar::kCodeKernels;
  }
}

}  // namespace llmqat::cpu
