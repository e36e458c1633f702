// The CUDA of arch.cuh on the CPU: every thread of a block is a fiber, blocks run one after
// another.
//
// A fiber runs until it meets a barrier or a warp collective, so a missing barrier shows up as a
// wrong result under at least one of the schedules (forward, reverse, shuffled). Deadlocks,
// collectives with lanes missing and barriers that some threads skip end the process with a
// message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace llmqat::emulated {

enum class State { ready, block_barrier, warp_collective, done };
enum Schedule { forward = 0, reverse = 1, shuffled = 2 };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state = State::ready;
  dim3 thread;
  uint32_t value = 0;  // in: the lane's operand; out: the warp's result
};

inline int schedule = forward;
inline std::vector<Fiber>* fibers = nullptr;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline const std::function<void()>* body = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s in block (%u, %u), thread (%u, %u)\n", what, blockIdx.x,
               blockIdx.y, threadIdx.x, threadIdx.y);
  std::abort();
}

inline void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  (*body)();
  current->state = State::done;
  swapcontext(&current->context, &scheduler);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  swapcontext(&scheduler, &fiber.context);
}

// Lets complete warps through their collective; returns whether there was one.
inline bool release_warps(std::vector<Fiber>& all) {
  bool released = false;
  for (size_t first = 0; first < all.size(); first += 32) {
    const auto begin = all.begin() + first, end = begin + std::min<size_t>(32, all.size() - first);
    const auto waiting = [](const Fiber& f) { return f.state == State::warp_collective; };
    const auto lanes = std::count_if(begin, end, waiting);
    if (lanes == 0) continue;
    if (lanes != 32) {
      if (std::any_of(begin, end, [](const Fiber& f) { return f.state == State::ready; })) continue;
      fail("a warp collective with lanes missing");
    }
    uint32_t top = 0;
    for (auto f = begin; f != end; ++f) top = std::max(top, f->value);
    for (auto f = begin; f != end; ++f) f->value = top, f->state = State::ready;
    released = true;
  }
  return released;
}

inline void run_block(dim3 block, std::mt19937& random) {
  std::vector<Fiber> all(block.x * block.y * block.z);
  fibers = &all;
  for (size_t i = 0; i < all.size(); ++i) {
    Fiber& f = all[i];
    f.thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    f.stack.resize(65536);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (schedule == reverse) std::reverse(order.begin(), order.end());
  for (;;) {
    if (schedule == shuffled) std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (size_t i : order) {
      if (all[i].state == State::ready) resume(all[i]), ran = true;
    }
    if (release_warps(all) || ran) continue;
    bool waiting = false;
    for (Fiber& f : all) {
      if (f.state == State::block_barrier) f.state = State::ready, waiting = true;
    }
    if (!waiting) return;
    // A barrier counts only when every thread of the block is at it.
    if (std::any_of(all.begin(), all.end(),
                    [](const Fiber& f) { return f.state == State::done; })) {
      fail("a block barrier that some threads never reach");
    }
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  std::mt19937 random(7);
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(block, random);
    }
  }
}

}  // namespace llmqat::emulated

inline void __syncthreads() { llmqat::emulated::wait(llmqat::emulated::State::block_barrier); }

namespace llmqat {

inline uint32_t redux_max_u32(uint32_t v) {
  emulated::current->value = v;
  emulated::wait(emulated::State::warp_collective);
  return emulated::current->value;
}

}  // namespace llmqat

#define LLMQAT_KERNEL(threads) void
#define LLMQAT_DEVICE inline
#define LLMQAT_SHARED static
#define LLMQAT_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream),                           \
   ::llmqat::emulated::launch(grid, block, [&] { (kernel)(__VA_ARGS__); }))
