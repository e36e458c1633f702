// 16-byte accesses, cp.async and atomics.
//
// cp.async gives the hardest legal timing: its destination is poison from the issue on and the data
// arrive only when the issuing thread waits for their group.
#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"
#include "llmqat/arch.cuh"

namespace llmqat {
namespace emulated {

inline void check_aligned(const void* p, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(text("%s: %p is not %zu-byte aligned", text({what, site}).c_str(), p, bytes));
  }
}

inline void check_shared(const void* p, size_t bytes, const char* what, Site site) {
  if (!is_shared(p, bytes)) fail(text({what, site}) + ": an address outside shared memory");
}

inline void check_global(const void* p, const char* what, Site site) {
  if (is_shared(p, 1)) fail(text({what, site}) + ": shared memory where global is needed");
}

template <class T, class F>
T atomic(T* p, F change, const char* what, Site site) {
  check_aligned(p, sizeof(T), what, site);
  check_global(p, what, site);
  const T old = *p;
  *p = change(old);
  return old;
}

inline int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

}  // namespace emulated

inline Word4 load_16(const void* p, emulated::Site site = emulated::Site::current()) {
  emulated::check_aligned(p, sizeof(Word4), "load_16", site);
  Word4 w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline Word4 load_streaming_16(const void* p, emulated::Site site = emulated::Site::current()) {
  emulated::check_global(p, "load_streaming_16", site);
  emulated::check_aligned(p, sizeof(Word4), "load_streaming_16", site);
  Word4 w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline void store_16(void* p, Word4 w, emulated::Site site = emulated::Site::current()) {
  emulated::check_aligned(p, sizeof w, "store_16", site);
  std::memcpy(p, &w, sizeof w);
}

inline void cp_async_16(void* shared, const void* global, bool valid,
                        emulated::Site site = emulated::Site::current()) {
  using namespace emulated;
  check_aligned(shared, sizeof(Word4), "cp_async_16", site);
  check_aligned(global, sizeof(Word4), "cp_async_16", site);
  check_shared(shared, sizeof(Word4), "cp_async_16", site);
  if (valid) check_global(global, "cp_async_16", site);
  Fiber& f = *block.current;
  Copy copy{static_cast<unsigned char*>(shared), {}, f.groups};
  if (valid) std::memcpy(copy.data, global, sizeof copy.data);
  std::memset(shared, kPoison, sizeof copy.data);
  f.copies.push_back(copy);
}

inline void cp_async_commit() { ++emulated::block.current->groups; }

template <int kGroups>
inline void cp_async_wait() {
  static_assert(kGroups >= 0);
  emulated::Fiber& f = *emulated::block.current;
  while (f.landed < f.copies.size() && f.copies[f.landed].group < f.groups - kGroups) {
    const emulated::Copy& copy = f.copies[f.landed++];
    std::memcpy(copy.shared, copy.data, sizeof copy.data);
  }
  if (f.landed == f.copies.size()) f.copies.clear(), f.landed = 0;
}

inline int32_t atomic_add_s32(int32_t* p, int32_t v,
                              emulated::Site site = emulated::Site::current()) {
  return emulated::atomic(
      p, [v](int32_t old) { return emulated::wrapping_add(old, v); }, "atomic_add_s32", site);
}

inline void reduce_add_s32(int32_t* p, int32_t v, emulated::Site site = emulated::Site::current()) {
  emulated::atomic(
      p, [v](int32_t old) { return emulated::wrapping_add(old, v); }, "reduce_add_s32", site);
}

inline uint32_t atomic_add_u32(uint32_t* p, uint32_t v,
                               emulated::Site site = emulated::Site::current()) {
  return emulated::atomic(p, [v](uint32_t old) { return old + v; }, "atomic_add_u32", site);
}

inline uint32_t atomic_max_u32(uint32_t* p, uint32_t v,
                               emulated::Site site = emulated::Site::current()) {
  return emulated::atomic(
      p, [v](uint32_t old) { return old > v ? old : v; }, "atomic_max_u32", site);
}

// Blocks and fibers run one at a time: every write is visible at once.
inline void thread_fence() {}

}  // namespace llmqat
