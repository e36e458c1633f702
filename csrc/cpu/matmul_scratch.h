// What the two matmul drivers share: scratch memory and equal cuts.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace llmqat::cpu {

// Uninitialized memory, 64-byte aligned. Grows, never shrinks: one thread_local object a purpose,
// so that steady-state calls do not allocate.
template <class T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      data_.reset();  // first: the old contents are not needed
      data_.reset(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlign)));
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// [begin, end) in the fewest parts of at most `most`, equal to within one: 16 rows become 8 + 8
// rather than 12 + 4, and every tile has enough accumulators to hide latency.
struct Cut {
  int64_t begin, end, parts;
  Cut(int64_t begin, int64_t end, int64_t most)
      : begin(begin), end(end), parts((end - begin + most - 1) / most) {}
  int64_t at(int64_t i) const { return begin + (end - begin) * i / parts; }
};

}  // namespace llmqat::cpu
