// The part of the CUDA runtime that bindings need, behind the C interface.
#include "launchers.h"

extern "C" const char* llmqat_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
