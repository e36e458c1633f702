// The part of the CUDA runtime that bindings need, behind the C interface.
#include "launchers.h"

extern "C" const char* llmqat_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int llmqat_cuda_multiprocessors(int64_t* count) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  *count = sms;
  return error;
}
