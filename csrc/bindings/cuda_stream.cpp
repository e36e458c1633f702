#include "cuda_stream.h"

#include <dlfcn.h>

namespace llmqat::bindings {

void* current_cuda_stream(int32_t device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  // A CUDA tensor exists, so torch has loaded this library: RTLD_NOLOAD only finds it. (The generic
  // stream handle of the stable ABI needs torch 2.13.)
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so is not loaded or has no current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device_index, &stream));
  return stream;
}

}  // namespace llmqat::bindings
