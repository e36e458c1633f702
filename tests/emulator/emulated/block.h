// The threads of one block as fibers, and the order in which they run.
//
// A fiber runs until it meets a barrier or a warp collective. Between two of these the schedule
// decides who goes first, so code that lacks a barrier gives other results under some schedule.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "context.h"
#include "cuda_types.h"
#include "hidden_memory.h"
#include "shared_memory.h"

namespace llmqat::emulated {

inline constexpr unsigned kLanes = 32;

// forward, reverse, shuffled: every thread to its next stop, in that order. greedy: one warp as far
// as it can get before the next one starts, first warp first; lagging: last warp first, so that the
// first one comes late.
enum Schedule { forward = 0, reverse = 1, shuffled = 2, greedy = 3, lagging = 4 };

inline int schedule = forward;
inline unsigned seed = 1;
inline std::mt19937 random_order;
inline std::string error;  // of the launch that failed; the first one counts

using Site = std::source_location;

struct Stop {  // what a fiber waits for
  const char* name = "";
  Site site;
  // The strings are literals of one translation unit: equal ones are one.
  bool operator==(const Stop& o) const {
    return name == o.name && site.line() == o.site.line() && site.file_name() == o.site.file_name();
  }
};

enum class State { ready, launch, barrier, collective, done };

struct Copy {  // one cp.async on its way
  unsigned char* shared;
  unsigned char data[16];
  int64_t group;
};

struct Fiber {
  Context context;
  State state = State::ready;
  unsigned index = 0;
  dim3 thread;
  Stop stop;
  void* argument = nullptr;  // of the collective
  std::vector<Copy> copies;  // in order of issue
  size_t landed = 0;         // of copies
  int64_t groups = 0;        // committed
  bool waited = false;       // for the launches before this one
};

struct Warp {
  unsigned arrived = 0;  // lanes at the collective
  Stop stop;             // of the first of them
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0;
  unsigned at_barrier = 0;
  unsigned at_wait = 0;
  unsigned done = 0;
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
};
inline Block block;

// ---- errors ----

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

inline std::string text(const Stop& stop) {
  const std::string path = stop.site.file_name();
  return text("%s (%s:%u)", stop.name, path.substr(path.rfind('/') + 1).c_str(),
              static_cast<unsigned>(stop.site.line()));
}

inline std::string text(const Fiber& f) {
  return text("block (%u, %u, %u), thread (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z,
              f.thread.x, f.thread.y, f.thread.z);
}

inline void set_error(const std::string& what) {
  if (error.empty()) error = what;
}

inline void leave() { Context::swap(block.current->context, block.scheduler); }

// Ends the launch. The message names the fiber that is to blame: the one running unless told.
[[noreturn]] inline void fail(const std::string& what, const Fiber* who = nullptr) {
  set_error(what + " in " + text(who != nullptr ? *who : *block.current));
  for (;;) leave();
}

// ---- fibers ----

inline void enter() {
  Context::entered(block.scheduler);
  (*block.body)();
  Fiber& f = *block.current;
  if (!f.waited) fail("a thread that never waits for the launches before its own");
  if (f.landed != f.copies.size()) fail("cp.async that was never waited for");
  f.state = State::done;
  ++block.done;
  for (;;) leave();
}

inline void resume(Fiber& f) {
  block.current = &f;
  threadIdx = f.thread;
  Context::swap(block.scheduler, f.context);
  block.current = nullptr;
}

inline void start_fibers() {
  const dim3 size = blockDim;
  block.threads = size.x * size.y * size.z;
  block.at_barrier = block.at_wait = block.done = 0;
  if (block.fibers.size() < block.threads) block.fibers.resize(block.threads);
  block.warps.assign((block.threads + kLanes - 1) / kLanes, Warp{});
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& f = block.fibers[i];
    f.state = State::ready;
    f.index = i;
    f.thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    f.copies.clear();
    f.landed = 0;
    f.groups = 0;
    f.waited = false;
    f.context.start(enter);
  }
}

inline void wait_for_block(Site site) {
  Fiber& f = *block.current;
  f.stop = {"sync_block", site};
  f.state = State::barrier;
  if (++block.at_barrier < block.threads) return leave();
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& other = block.fibers[i];
    if (!(other.stop == f.stop)) {
      fail("threads of a block at different barriers: " + text(f.stop) + " and " + text(other.stop),
           &other);
    }
    other.state = State::ready;
  }
  block.at_barrier = 0;
}

// ---- schedule ----

inline void order(std::vector<unsigned>& items) {
  std::iota(items.begin(), items.end(), 0u);
  if (schedule == reverse || schedule == lagging) std::reverse(items.begin(), items.end());
  if (schedule == shuffled) std::shuffle(items.begin(), items.end(), random_order);
}

// Runs each ready fiber of [first, last) once; returns whether there was one.
inline bool run_once(const std::vector<unsigned>& threads, size_t first, size_t last) {
  bool ran = false;
  for (size_t i = first; i < last && error.empty(); ++i) {
    Fiber& f = block.fibers[threads[i]];
    if (f.state != State::ready) continue;
    resume(f);
    ran = true;
  }
  return ran;
}

// Says what each kind of waiting thread waits for.
inline void report_deadlock() {
  const auto end = block.fibers.begin() + block.threads;
  if (hidden.is_hidden) {
    const auto late = std::find_if(block.fibers.begin(), end,
                                   [](const Fiber& f) { return f.state != State::launch; });
    return set_error("griddepcontrol_wait that some threads come to too late: at " +
                     text(late->stop) + " in " + text(*late));
  }
  const auto stuck = std::find_if(block.fibers.begin(), end,
                                  [](const Fiber& f) { return f.state == State::collective; });
  if (stuck != end) {
    const unsigned warp = stuck->index / kLanes;
    const unsigned last = std::min(block.threads, (warp + 1) * kLanes);
    unsigned missing = warp * kLanes;
    while (missing < last && block.fibers[missing].state == State::collective) ++missing;
    const std::string why = missing == last ? "the warp is not full"
                            : block.fibers[missing].state == State::done
                                ? "one has ended"
                                : "one waits at " + text(block.fibers[missing].stop);
    return set_error("a warp collective with lanes missing: " + text(stuck->stop) + " has " +
                     text("%u", block.warps[warp].arrived) + " of 32 lanes, " + why + " in " +
                     text(missing == last ? *stuck : block.fibers[missing]));
  }
  const auto at = std::find_if(block.fibers.begin(), end,
                               [](const Fiber& f) { return f.state == State::barrier; });
  const auto gone = std::find_if(block.fibers.begin(), end,
                                 [](const Fiber& f) { return f.state == State::done; });
  set_error("a block barrier that some threads never reach: " + text(at->stop) + ", ended in " +
            text(*gone));
}

// One block from start to end, or to an error.
inline void run_block() {
  start_fibers();
  hidden.hide();
  std::vector<unsigned> threads(block.threads);
  const bool by_warp = schedule == greedy || schedule == lagging;
  const size_t step = by_warp ? kLanes : block.threads;
  order(threads);
  while (block.done < block.threads) {
    bool ran = false;
    for (size_t first = 0; first < block.threads && !(by_warp && ran); first += step) {
      ran |= run_once(threads, first, std::min<size_t>(block.threads, first + step));
    }
    if (error.empty() && !ran) report_deadlock();
    if (!error.empty()) return;
    if (schedule == shuffled) order(threads);
  }
  if (!shared_intact()) {
    set_error("a write next to shared memory in " + text(block.fibers[0]) + " or another of it");
  }
}

}  // namespace llmqat::emulated
