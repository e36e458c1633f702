// A stack of its own for each CUDA thread, and the switch between two stacks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace llmqat::emulated {

inline constexpr size_t kStackBytes = 256 * 1024;  // touched pages only take memory
inline constexpr size_t kStackAlign = 16;

// Pages that fault before a stack runs into its neighbour.
inline unsigned char* allocate_stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* p = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a stack");
    std::abort();
  }
  return static_cast<unsigned char*>(p) + page;
}

#if defined(__x86_64__)

// Saves the registers that a call must keep on this stack, and goes on where `to` was saved.
// swapcontext would do, but it makes two system calls.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noipa))
#endif
inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

struct Registers {
  void* stack_pointer = nullptr;
  void start(unsigned char* stack, void (*entry)()) {
    constexpr int kSaved = 6;
    auto** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // where the caller's return address would be
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSaved; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Registers& from, Registers& to) {
    switch_stack(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Registers {
  ucontext_t context;
  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Registers& from, Registers& to) { swapcontext(&from.context, &to.context); }
};

#endif

// Registers and stack; the scheduler's is the stack it was called on.
struct Context {
  Registers registers;
  unsigned char* stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif

  void start(void (*entry)()) {
    if (stack == nullptr) stack = allocate_stack();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // the last fiber on it never returned
    bottom = stack;
    size = kStackBytes;
    fake_stack = nullptr;
#endif
    registers.start(stack, entry);
  }

  // AddressSanitizer must know which stack is in use.
  static void swap(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
    Registers::swap(from.registers, to.registers);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  // The first thing on a new stack; tells the scheduler's stack to AddressSanitizer.
  static void entered([[maybe_unused]] Context& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  }
};

}  // namespace llmqat::emulated
