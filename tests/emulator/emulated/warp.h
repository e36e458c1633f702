// Barriers and the collectives of a warp: the last lane to arrive does the work for all 32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block.h"

namespace llmqat {
namespace emulated {

template <class Argument>
using Lanes = Argument* const (&)[kLanes];

// Waits for all lanes at this call, then `run` has seen the arguments of all of them.
template <class Argument, class Run>
void collective(Argument& argument, const char* name, Site site, Run run) {
  Fiber& me = *block.current;
  const unsigned first = me.index / kLanes * kLanes;
  Warp& warp = block.warps[me.index / kLanes];
  me.stop = {name, site};
  me.argument = &argument;
  me.state = State::collective;
  if (warp.arrived++ == 0) warp.stop = me.stop;
  if (!(me.stop == warp.stop)) {
    fail("lanes of a warp at different collectives: " + text(me.stop) + " and " + text(warp.stop));
  }
  if (warp.arrived < kLanes) return leave();
  Argument* arguments[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) {
    arguments[i] = static_cast<Argument*>(block.fibers[first + i].argument);
  }
  run(arguments);
  warp.arrived = 0;
  for (unsigned i = 0; i < kLanes; ++i) block.fibers[first + i].state = State::ready;
}

inline const Fiber& lane_of_my_warp(unsigned lane) {
  return block.fibers[block.current->index / kLanes * kLanes + lane];
}

template <class T>
struct Shuffle {
  T value;
  int lane;  // to read from
  T result;
};

template <class T>
T shuffle_from(T v, int lane, const char* name, Site site) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, int32_t> ||
                std::is_same_v<T, float>);
  Shuffle<T> mine{v, lane, v};
  collective(mine, name, site, [&](auto& lanes) {
    for (unsigned i = 0; i < kLanes; ++i) {
      const int from = lanes[i]->lane;
      if (from < 0 || from >= static_cast<int>(kLanes)) {
        fail(text("%s from lane %d", text({name, site}).c_str(), from), &lane_of_my_warp(i));
      }
      lanes[i]->result = lanes[from]->value;
    }
  });
  return mine.result;
}

inline int my_lane() { return static_cast<int>(block.current->index % kLanes); }

}  // namespace emulated

inline void sync_block(emulated::Site site = emulated::Site::current()) {
  emulated::wait_for_block(site);
}

inline void sync_warp(emulated::Site site = emulated::Site::current()) {
  int nothing = 0;
  emulated::collective(nothing, "sync_warp", site, [](auto&) {});
}

template <class T>
inline T shuffle(T v, int lane, emulated::Site site = emulated::Site::current()) {
  return emulated::shuffle_from(v, lane, "shuffle", site);
}

template <class T>
inline T shuffle_xor(T v, int mask, emulated::Site site = emulated::Site::current()) {
  return emulated::shuffle_from(v, emulated::my_lane() ^ mask, "shuffle_xor", site);
}

template <class T>
inline T shuffle_down(T v, int n, emulated::Site site = emulated::Site::current()) {
  const int from = emulated::my_lane() + n;
  const bool inside = n >= 0 && n < static_cast<int>(emulated::kLanes);
  const bool kept = inside && from >= static_cast<int>(emulated::kLanes);
  return emulated::shuffle_from(v, kept ? emulated::my_lane() : from, "shuffle_down", site);
}

inline uint32_t ballot(bool v, emulated::Site site = emulated::Site::current()) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{v, 0};
  emulated::collective(vote, "ballot", site, [](auto& lanes) {
    uint32_t all = 0;
    for (unsigned i = 0; i < emulated::kLanes; ++i) all |= (lanes[i]->mine ? 1u : 0u) << i;
    for (auto* lane : lanes) lane->all = all;
  });
  return vote.all;
}

inline uint32_t redux_max_u32(uint32_t v, emulated::Site site = emulated::Site::current()) {
  emulated::collective(v, "redux_max_u32", site, [](auto& lanes) {
    uint32_t top = 0;
    for (const auto* lane : lanes) top = std::max(top, *lane);
    for (auto* lane : lanes) *lane = top;
  });
  return v;
}

inline int32_t redux_add_s32(int32_t v, emulated::Site site = emulated::Site::current()) {
  emulated::collective(v, "redux_add_s32", site, [](auto& lanes) {
    uint32_t sum = 0;  // wraps, as the instruction does
    for (const auto* lane : lanes) sum += static_cast<uint32_t>(*lane);
    for (auto* lane : lanes) *lane = static_cast<int32_t>(sum);
  });
  return v;
}

}  // namespace llmqat
