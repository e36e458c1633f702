// The emulator's twin of what llmqat/arch.cuh declares for nvcc: CUDA kernels on the CPU.
// docs/emulator.md says what it can and cannot show.
#pragma once

#include "launch.h"
#include "memory.h"
#include "overlap.h"
#include "registers.h"
#include "tensor_cores.h"
#include "warp.h"

#define LLMQAT_KERNEL(threads) void
#define LLMQAT_KERNEL_MIN_BLOCKS(threads, blocks_per_sm) void
#define LLMQAT_DEVICE inline

#define LLMQAT_STATIC_SHARED(type, name, count)                     \
  static ::llmqat::emulated::StaticShared<type, count> name##_here; \
  type(&name)[count] = name##_here.memory.values
#define LLMQAT_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::llmqat::emulated::dynamic_shared.data().begin

// As many as share an SM's memory: here it is all that limits them.
#define LLMQAT_RESIDENT_BLOCKS(kernel, threads, shared_bytes) \
  (static_cast<int>(::llmqat::emulated::kSharedLimit / (shared_bytes)))

#define LLMQAT_LAUNCH(kernel, grid, block, stream, ...) \
  LLMQAT_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define LLMQAT_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                                \
   ::llmqat::emulated::launch(grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
