// A grid: its blocks one after another, in the order of the schedule. A kernel that faults ends the
// launch with an error, not the process.
#pragma once

#include <setjmp.h>
#include <signal.h>

#include <cstddef>
#include <functional>
#include <vector>

#include "block.h"

namespace llmqat::emulated {

inline cudaError_t last_error = cudaSuccess;
inline int launches = 0;  // grids begun since they were taken

// ---- faults ----

inline sigjmp_buf after_fault;
inline constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
inline constexpr int kFaultKinds = sizeof kFaults / sizeof *kFaults;

inline void on_fault(int signal, siginfo_t* info, void*) {
  if (block.current == nullptr) {  // not in a kernel: die as without this handler
    ::signal(signal, SIG_DFL);
    return;
  }
  const Fiber& f = *block.current;
  std::string what;
  if (signal == SIGILL || signal == SIGTRAP) {
    what = "undefined behaviour (alignment, bounds, shift or signed overflow)";
  } else if (signal == SIGFPE) {
    what = "an integer division by zero";
  } else if (hidden.holds(info->si_addr)) {
    what = "global memory before griddepcontrol_wait";
  } else if (dynamic_shared.is_near(info->si_addr)) {
    what = "an access outside shared memory";
  } else {
    what = text("a memory fault at %p", info->si_addr);
  }
  const std::string last = *f.stop.name != '\0' ? ", after " + text(f.stop) : "";
  set_error(what + " in " + text(f) + last);
  siglongjmp(after_fault, 1);
}

// Catches faults while it lives. Under AddressSanitizer faults are its own to report.
class CatchFaults {
 public:
#if defined(__SANITIZE_ADDRESS__)
  CatchFaults() {}
#else
  CatchFaults() {
    static unsigned char stack[64 * 1024];  // a fiber's own may be what overflowed
    stack_t mine{};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < kFaultKinds; ++i) sigaction(kFaults[i], &action, &old_[i]);
  }
  ~CatchFaults() {
    for (int i = 0; i < kFaultKinds; ++i) sigaction(kFaults[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  struct sigaction old_[kFaultKinds];
  stack_t old_stack_;
#endif
};

// ---- grid ----

inline bool is_valid(dim3 grid, dim3 size, size_t shared_bytes) {
  constexpr unsigned kMaxThreads = 1024, kMaxZ = 64, kMaxGridYZ = 65535, kMaxGridX = 0x7FFFFFFF;
  const bool counts = grid.x >= 1 && grid.x <= kMaxGridX && grid.y >= 1 && grid.y <= kMaxGridYZ &&
                      grid.z >= 1 && grid.z <= kMaxGridYZ;
  const bool threads = size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= kMaxThreads &&
                       size.y <= kMaxThreads && size.z <= kMaxZ &&
                       size.x * size.y * size.z <= kMaxThreads;
  return counts && threads && shared_bytes <= kSharedLimit;
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!error.empty()) return;  // as on a device: after a failed kernel nothing runs
  if (!is_valid(grid, size, shared_bytes)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid;
  blockDim = size;
  ++launches;
  block.body = &kernel;
  random_order.seed(seed);
  dynamic_shared.resize(shared_bytes);
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  order(blocks);
  hidden.refresh();
  {
    const CatchFaults faults;
    if (sigsetjmp(after_fault, 1) == 0) {
      for (const unsigned b : blocks) {
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        begin_shared();
        run_block();
        if (!error.empty()) break;
      }
    }
  }
  hidden.show();
  block.current = nullptr;
  if (!error.empty()) last_error = cudaErrorLaunchFailure;
}

}  // namespace llmqat::emulated

inline cudaError_t cudaGetLastError() {
  const cudaError_t e = llmqat::emulated::last_error;
  llmqat::emulated::last_error = cudaSuccess;
  return e;
}

// What Python calls (build.py).
extern "C" {

__attribute__((used, visibility("default"))) inline void emulator_set_schedule(int kind,
                                                                               unsigned seed) {
  llmqat::emulated::schedule = kind;
  llmqat::emulated::seed = seed;
}

// The message of the launch that failed since the last call, or "".
__attribute__((used, visibility("default"))) inline const char* emulator_take_error() {
  static std::string taken;
  taken = llmqat::emulated::error;
  llmqat::emulated::error.clear();
  return taken.c_str();
}

// Whose memory kernels may not touch before they have waited; null: nobody's.
__attribute__((used, visibility("default"))) inline void emulator_hide(
    llmqat::emulated::HiddenMemory::List list) {
  llmqat::emulated::hidden.list = list;
}

// How many grids were begun since the last call.
__attribute__((used, visibility("default"))) inline int emulator_take_launches() {
  const int taken = llmqat::emulated::launches;
  llmqat::emulated::launches = 0;
  return taken;
}

}  // extern "C"
