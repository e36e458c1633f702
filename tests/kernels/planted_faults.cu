// Three tiny kernels for tests/kernels/test_cuda_sanitizer.py: one is right, one writes beyond the
// end of its buffer, one reads shared memory that another warp may not have written yet.
#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void right(int* p) { p[threadIdx.x] = static_cast<int>(threadIdx.x); }

__global__ void overrun(int* p) {
  p[threadIdx.x + (threadIdx.x == kThreads - 1 ? 1 : 0)] = static_cast<int>(threadIdx.x);
}

__global__ void race(int* p) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  // A __syncthreads() is missing here.
  p[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main(int count, char** arguments) {
  const char* which = count > 1 ? arguments[1] : "";
  int* p = nullptr;
  cudaError_t error = cudaMalloc(&p, kThreads * sizeof *p);
  if (error == cudaSuccess) {
    if (std::strcmp(which, "right") == 0) right<<<1, kThreads>>>(p);
    if (std::strcmp(which, "overrun") == 0) overrun<<<1, kThreads>>>(p);
    if (std::strcmp(which, "race") == 0) race<<<1, kThreads>>>(p);
    error = cudaDeviceSynchronize();
  }
  std::printf("%s: %s\n", which, cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 1;
}
