// What CUDA kernels need from the compiler and the machine, each behind one name, so that the
// emulator in tests/emulator can supply its own. Inline PTX may appear in this file only: one
// wrapper per instruction, named by the ISA.
#pragma once

#include <cstdint>

#if defined(LLMQAT_EMULATED)
#include "cuda_threads.h"  // tests/emulator
#else

#define LLMQAT_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define LLMQAT_DEVICE __device__ __forceinline__
#define LLMQAT_SHARED __shared__
#define LLMQAT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace llmqat {

// redux.sync.max.u32 (sm_80): the maximum over a full warp, in every lane.
LLMQAT_DEVICE uint32_t redux_max_u32(uint32_t v) { return __reduce_max_sync(0xFFFFFFFFu, v); }

}  // namespace llmqat

#endif
