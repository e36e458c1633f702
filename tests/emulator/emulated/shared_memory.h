// Shared memory of the block that runs: poisoned before each block, with guard zones around it.
//
// The poison is 0xFF: NaN in every float format, -1 in every code. Dynamic shared memory ends at a
// page that faults; what the alignment leaves over on either side is poisoned too and must be
// untouched when the block ends.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace llmqat::emulated {

inline constexpr int kPoison = 0xFF;
inline constexpr size_t kSharedAlign = 128;
// What one block may use: 163 KiB on sm_80, 227 KiB on sm_90.
inline constexpr size_t kSharedLimit = (LLMQAT_EMULATED_ARCH >= 90 ? 227 : 163) * 1024;

struct Region {
  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;
  bool holds(const void* p, size_t bytes) const {
    const auto* c = static_cast<const unsigned char*>(p);
    return c >= begin && c <= end && bytes <= static_cast<size_t>(end - c);
  }
};

inline bool untouched(const unsigned char* begin, const unsigned char* end) {
  return std::all_of(begin, end, [](unsigned char c) { return c == kPoison; });
}

inline void poison(unsigned char* begin, unsigned char* end) {
  if (begin < end) std::memset(begin, kPoison, static_cast<size_t>(end - begin));
}

// Arrays of LLMQAT_STATIC_SHARED that a launch has met so far, and the zones around them.
struct StaticRegion {
  Region guarded, data;
};
inline std::vector<StaticRegion> static_regions;

template <class T, int kCount>
struct StaticShared {
  static constexpr int kGuard = 64;
  struct {
    unsigned char before[kGuard];
    alignas(kSharedAlign) T values[kCount];
    unsigned char after[kGuard];
  } memory;
  StaticShared() {
    auto* begin = reinterpret_cast<unsigned char*>(&memory);
    auto* data = reinterpret_cast<unsigned char*>(memory.values);
    poison(begin, begin + sizeof memory);
    static_regions.push_back({{begin, begin + sizeof memory}, {data, data + sizeof memory.values}});
  }
};

class DynamicShared {
 public:
  // Places `bytes` at the end of the mapping and protects the pages before it.
  void resize(size_t bytes) {
    if (map_.begin == nullptr) reserve();
    open(map_.begin, map_.end, PROT_READ | PROT_WRITE);
    unpoison();
    const size_t rounded = (bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
    data_ = {map_.end - rounded, map_.end - rounded + bytes};
    first_ = map_.begin + static_cast<size_t>(data_.begin - map_.begin) / page_ * page_;
    open(map_.begin, first_, PROT_NONE);
    poison(first_, map_.end);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(first_, static_cast<size_t>(data_.begin - first_));
    __asan_poison_memory_region(data_.end, static_cast<size_t>(map_.end - data_.end));
#endif
  }

  void begin_block() { poison(data_.begin, data_.end); }

  // Whether the zones around it are as they were; AddressSanitizer looks at each access instead.
  bool intact() const {
#if defined(__SANITIZE_ADDRESS__)
    return true;
#else
    return untouched(first_, data_.begin) && untouched(data_.end, map_.end);
#endif
  }

  const Region& data() const { return data_; }

  // Whether an address that faulted lies just outside.
  bool is_near(const void* p) const {
    return Region{map_.begin - page_, map_.end + page_}.holds(p, 1);
  }

 private:
  void reserve() {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (kSharedLimit + page_ - 1) / page_ * page_;
    void* p = mmap(nullptr, bytes + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("emulator: no memory for shared memory");
      std::abort();
    }
    auto* begin = static_cast<unsigned char*>(p) + page_;
    map_ = {begin, begin + bytes};
  }

  static void open(unsigned char* begin, unsigned char* end, int protection) {
    if (begin == end) return;
    if (mprotect(begin, static_cast<size_t>(end - begin), protection) != 0) {
      std::perror("emulator: mprotect");
      std::abort();
    }
  }

  void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(map_.begin, static_cast<size_t>(map_.end - map_.begin));
#endif
  }

  size_t page_ = 0;
  Region map_, data_;
  unsigned char* first_ = nullptr;  // of the pages that may be touched
};

inline DynamicShared dynamic_shared;

inline bool is_shared(const void* p, size_t bytes) {
  return dynamic_shared.data().holds(p, bytes) ||
         std::any_of(static_regions.begin(), static_regions.end(),
                     [&](const StaticRegion& r) { return r.data.holds(p, bytes); });
}

inline void begin_shared() {
  dynamic_shared.begin_block();
  for (const StaticRegion& r : static_regions) poison(r.guarded.begin, r.guarded.end);
}

inline bool shared_intact() {
  return dynamic_shared.intact() &&
         std::all_of(static_regions.begin(), static_regions.end(), [](const StaticRegion& r) {
           return untouched(r.guarded.begin, r.data.begin) && untouched(r.data.end, r.guarded.end);
         });
}

}  // namespace llmqat::emulated
