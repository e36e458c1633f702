// Pages that a block may not touch before all its threads have waited for the launches before it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmqat::emulated {

class HiddenMemory {
 public:
  // Fills in pairs of address and bytes, whole pages; a 0 ends them.
  using List = const uint64_t* (*)();

  List list = nullptr;  // null: nothing is hidden
  bool is_hidden = false;

  // For a launch that begins.
  void refresh() {
    ranges_.clear();
    if (list == nullptr) return;
    for (const uint64_t* pair = list(); pair[0] != 0; pair += 2) {
      ranges_.push_back({reinterpret_cast<unsigned char*>(pair[0]), pair[1]});
    }
  }

  void hide() { protect(PROT_NONE, !ranges_.empty()); }
  void show() { protect(PROT_READ | PROT_WRITE, false); }

  bool holds(const void* p) const {
    const auto* at = static_cast<const unsigned char*>(p);
    for (const Range& range : ranges_) {
      if (at >= range.begin && at < range.begin + range.bytes) return is_hidden;
    }
    return false;
  }

 private:
  struct Range {
    unsigned char* begin;
    size_t bytes;
  };

  void protect(int how, bool hidden_then) {
    if (how != PROT_NONE && !is_hidden) return;
    for (const Range& range : ranges_) mprotect(range.begin, range.bytes, how);
    is_hidden = hidden_then;
  }

  std::vector<Range> ranges_;
};

inline HiddenMemory hidden;

}  // namespace llmqat::emulated
