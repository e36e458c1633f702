// Overlapping launches: the emulator's blocks never overlap, so both instructions do nothing. But it
// sees to their rule: every thread waits before it ends and, where Python lists the memory of the
// tests, before it touches any of that.
#pragma once

#include "block.h"

namespace llmqat {

inline void griddepcontrol_launch_dependents() {}
inline void prefetch_l2(const void*) {}

inline void griddepcontrol_wait(emulated::Site site = emulated::Site::current()) {
  using namespace emulated;
  Fiber& f = *block.current;
  if (f.waited) return;
  f.waited = true;
  if (!hidden.is_hidden) return;
  f.stop = {"griddepcontrol_wait", site};
  f.state = State::launch;
  if (++block.at_wait < block.threads) return leave();
  hidden.show();
  for (unsigned i = 0; i < block.threads; ++i) block.fibers[i].state = State::ready;
}

}  // namespace llmqat
