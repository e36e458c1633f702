// The workspaces of the linears on packed weights: one for each device and stream, kept for good.
//
// Kernels of one stream run one after another and each leaves zeros, so they share one; a graph
// keeps the address that it was captured with. Allocated past torch: a tensor made while a stream
// is captured would belong to that graph.
#include <map>
#include <mutex>
#include <utility>

#include "cuda/quantized_linear.h"
#include "llmqat/heuristics_linear.h"

namespace llmqat {
namespace {

struct Workspace {
  void* memory;
  int64_t sms;
};

// Allows this thread to allocate and to wait while another of its streams is captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Zeroed on a stream of its own, since the caller's may be under capture.
cudaError_t zeroed(size_t bytes, void** memory) {
  const RelaxedCapture relaxed;
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMalloc(memory, bytes);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(*memory, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) cudaFree(*memory);
  }
  cudaStreamDestroy(stream);
  return error;
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_linear_workspace(void* stream, void** workspace, int64_t* sms) {
  static std::mutex mutex;
  static auto* const workspaces = new std::map<std::pair<int, void*>, llmqat::Workspace>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const auto found = workspaces->find({device, stream});
  if (found == workspaces->end()) {
    int count = 0;
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    void* memory = nullptr;
    error = llmqat::zeroed(static_cast<size_t>(llmqat::linear_workspace_bytes(count)), &memory);
    if (error != cudaSuccess) return error;
    workspaces->insert({{device, stream}, {memory, count}});
    *workspace = memory;
    *sms = count;
  } else {
    *workspace = found->second.memory;
    *sms = found->second.sms;
  }
  return cudaSuccess;
}

extern "C" int llmqat_cuda_read_int32(const int32_t* device, int32_t* host, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(host, device, sizeof *host, cudaMemcpyDeviceToHost, s);
  return error == cudaSuccess ? cudaStreamSynchronize(s) : error;
}
