// What the bindings of CUDA operators share: checks, and torch's current stream without linking
// libtorch_cuda, so that one library loads everywhere.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "checks.h"
#include "cuda/launchers.h"

namespace llmqat::bindings {

// The cudaStream_t that torch uses on this device.
void* current_cuda_stream(int32_t device_index);

inline void check_cuda(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor; move it with .cuda()");
}

// For what kernels load 16 bytes at a time at any address: at a wrong one such a load would end the
// CUDA context. A fresh tensor is aligned, a view may not be.
inline void check_aligned(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                  ": expected memory aligned to 16 bytes; clone the view");
}

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": ", llmqat_cuda_error(error));
}

inline int cuda_dtype(ScalarType dtype, const char* name) {
  check_float_dtype(dtype, name);
  return dtype == ScalarType::Float      ? LLMQAT_FLOAT32
         : dtype == ScalarType::BFloat16 ? LLMQAT_BFLOAT16
                                         : LLMQAT_FLOAT16;
}

}  // namespace llmqat::bindings
