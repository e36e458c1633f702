// Memory that a thread keeps between calls.
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

}  // namespace llmqat::cpu
