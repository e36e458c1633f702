// The words of the CUDA language and runtime that kernels and launchers use.
#pragma once

// The architecture whose code paths and limits the emulator takes: 80 or 90.
#if !defined(LLMQAT_EMULATED_ARCH)
#define LLMQAT_EMULATED_ARCH 80
#endif

#if LLMQAT_EMULATED_ARCH >= 90
#define LLMQAT_HAS_INT4_MMA 0
#else
#define LLMQAT_HAS_INT4_MMA 1
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorInvalidValue = 1;
inline constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline constexpr cudaError_t cudaErrorLaunchFailure = 719;

// Of the fiber that is running.
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
