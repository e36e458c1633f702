// How a kernel of many rows asks for threads: the kernels do not know torch, the bindings hand this
// in.
#pragma once

#include <cstdint>

#include "llmqat/heuristics.h"

namespace llmqat::cpu {

// A view of a thread pool; cheap to copy.
class Parallel {
 public:
  using Body = void(const void* f, int64_t begin, int64_t end);
  // Calls body(f, begin, end) for ranges of at least `grain` that cover 0..count.
  using For = void(int64_t count, int64_t grain, Body* body, const void* f);

  Parallel(int64_t threads, For* run) : threads_(threads), run_(run) {}

  int64_t threads() const { return threads_; }

  // f(begin, end) over rows of row_bytes of traffic each. What is one task runs at once: a decode
  // step asks some hundred times, and the pool would not split it either.
  template <class F>
  void rows(int64_t count, int64_t row_bytes, const F& f) const {
    if (count <= 0) return;
    const int64_t grain = rows_per_task(row_bytes);
    if (threads_ == 1 || count <= grain) return f(int64_t{0}, count);
    run_(
        count, grain,
        [](const void* g, int64_t begin, int64_t end) { (*static_cast<const F*>(g))(begin, end); },
        &f);
  }

 private:
  int64_t threads_;
  For* run_;
};

}  // namespace llmqat::cpu
