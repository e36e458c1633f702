// Small kernels that show the emulator's order and timing, and kernels that a device forbids.
#include <cstring>

#include "llmqat/arch.cuh"

using namespace llmqat;

namespace {

// A kernel that runs `body` in its turn.
template <class F>
auto in_turn(F body) {
  return [=] {
    take_turn();
    body();
  };
}

template <class F>
int one_block(unsigned threads, size_t shared_bytes, F body) {
  LLMQAT_LAUNCH_SHARED(in_turn(body), 1, threads, shared_bytes, nullptr);
  return cudaGetLastError();
}

unsigned char* shared_memory() {
  LLMQAT_DYNAMIC_SHARED(shared);
  return shared;
}

}  // namespace

extern "C" {

// ---- order and timing ----

// Who came when: out[i] = block * 1000 + thread, each thread twice (before and after a barrier).
int trace(unsigned blocks, unsigned threads, int32_t* out) {
  int32_t* next = out;
  const auto body = [&] {
    const auto mark = [&] { *next++ = static_cast<int32_t>(blockIdx.x * 1000 + threadIdx.x); };
    mark();
    sync_warp();
    mark();
    sync_block();
  };
  LLMQAT_LAUNCH(in_turn(body), blocks, threads, nullptr);
  return cudaGetLastError();
}

// What shared memory holds when a block starts; each block then overwrites it.
int fresh_shared(unsigned blocks, size_t bytes, unsigned char* out) {
  const auto body = [&] {
    LLMQAT_STATIC_SHARED(unsigned char, small, 16);
    unsigned char* const shared = shared_memory();
    unsigned char* const mine = out + blockIdx.x * (bytes + 16);
    std::memcpy(mine, shared, bytes);
    std::memcpy(mine + bytes, small, 16);
    std::memset(shared, 1, bytes);
    std::memset(small, 1, 16);
  };
  LLMQAT_LAUNCH_SHARED(in_turn(body), blocks, 1, bytes, nullptr);
  return cudaGetLastError();
}

// The destination of two cp.async: before the issue, after it, after wait<1>, after wait<0>.
int copy_timing(const unsigned char* global, unsigned char* out) {
  return one_block(1, 32, [&] {
    unsigned char* const shared = shared_memory();
    std::memset(shared, 5, 32);
    const auto look = [&](int i) { std::memcpy(out + 32 * i, shared, 32); };
    look(0);
    cp_async_16(shared, global, true);
    cp_async_commit();
    cp_async_16(shared + 16, global, false);
    cp_async_commit();
    look(1);
    cp_async_wait<1>();
    look(2);
    cp_async_wait<0>();
    look(3);
  });
}

// Neighbours exchange values through shared memory; bits of `barriers`: which of the two are there.
int exchange(int barriers, int32_t* out) {
  return one_block(64, 64 * 4, [&] {
    auto* const values = reinterpret_cast<int32_t*>(shared_memory());
    const unsigned t = threadIdx.x;
    values[t] = static_cast<int32_t>(t);
    if ((barriers & 1) != 0) sync_block();
    int32_t v = values[(t + 32) % 64];
    if ((barriers & 2) != 0) sync_block();
    values[t] = v + 100;
    sync_block();
    out[t] = values[t ^ 1] + v * 1000;
  });
}

int big_shared(size_t bytes) {
  return one_block(1, bytes, [] {});
}

int threads_per_block(unsigned threads) {
  return one_block(threads, 0, [] {});
}

int int4_mma() { return LLMQAT_HAS_INT4_MMA; }

// ---- faults ----

int missing_lane() {
  return one_block(64, 0, [] {
    if (threadIdx.x != 37) sync_warp();
  });
}

int partial_warp() {
  return one_block(40, 0, [] { ballot(true); });
}

int different_collectives() {
  return one_block(32, 0, [] {
    if (threadIdx.x == 3) {
      redux_max_u32(1);
    } else {
      ballot(true);
    }
  });
}

int lane_at_barrier() {
  return one_block(32, 0, [] {
    if (threadIdx.x == 9) {
      sync_block();
    } else {
      sync_warp();
    }
  });
}

int skipped_barrier() {
  return one_block(64, 0, [] {
    if (threadIdx.x < 32) sync_block();
  });
}

int different_barriers() {
  return one_block(64, 0, [] {
    if (threadIdx.x < 32) {
      sync_block();
    } else {
      sync_block();
    }
  });
}

int shuffle_outside(int lane) {
  return one_block(32, 0, [&] { shuffle(1.0f, threadIdx.x == 5 ? lane : 0); });
}

int misaligned_ldmatrix() {
  return one_block(32, 1024, [] {
    uint32_t r[4];
    ldmatrix_x4(r, shared_memory() + 16 * threadIdx.x + (threadIdx.x == 6 ? 8 : 0));
  });
}

int ldmatrix_outside() {
  return one_block(32, 496, [] {
    uint32_t r[4];
    ldmatrix_x4(r, shared_memory() + 16 * threadIdx.x);
  });
}

int misaligned_copy(const unsigned char* global) {
  return one_block(1, 64, [&] { cp_async_16(shared_memory(), global + 4, true); });
}

int copy_outside(const unsigned char* global) {
  return one_block(1, 64, [&] { cp_async_16(shared_memory() + 56 + 8, global, true); });
}

int unwaited_copy(const unsigned char* global) {
  return one_block(1, 64, [&] {
    cp_async_16(shared_memory(), global, true);
    cp_async_commit();
    cp_async_wait<1>();
  });
}

int misaligned_load(const unsigned char* global) {
  return one_block(1, 0, [&] { load_streaming_16(global + 8); });
}

int misaligned_store() {
  return one_block(1, 64, [] { store_16(shared_memory() + 4, Word4{}); });
}

int shared_atomic() {
  return one_block(1, 64, [] { atomic_add_s32(reinterpret_cast<int32_t*>(shared_memory()), 1); });
}

int write_after_shared(size_t offset) {
  return one_block(1, 100, [&] { shared_memory()[offset] = 3; });
}

int write_before_shared(size_t offset) {
  return one_block(1, 100, [&] { *(shared_memory() - offset) = 3; });
}

int write_after_static() {
  return one_block(1, 0, [] {
    LLMQAT_STATIC_SHARED(unsigned char, small, 16);
    const_cast<volatile unsigned char*>(&small[0])[16] = 3;
  });
}

// Thread (1, 2, 0) of block (3, 1, 0).
int read_at(const volatile unsigned char* p) {
  const auto body = [&] {
    if (blockIdx.x == 3 && blockIdx.y == 1 && threadIdx.x == 1 && threadIdx.y == 2) {
      static_cast<void>(*p);
    }
  };
  LLMQAT_LAUNCH(in_turn(body), dim3(4, 2), dim3(2, 3), nullptr);
  return cudaGetLastError();
}

// Bits of `late`: each thread reads before it waits, the last one ends without waiting, the first
// one waits after a barrier.
int turns(int late, const volatile unsigned char* p) {
  const auto body = [&] {
    if ((late & 1) != 0) static_cast<void>(*p);
    if ((late & 2) != 0 && threadIdx.x == 63) return;
    if ((late & 4) != 0 && threadIdx.x == 0) sync_block();
    take_turn();
    static_cast<void>(*p);
    if ((late & 4) == 0 || threadIdx.x != 0) sync_block();
  };
  LLMQAT_LAUNCH(body, 2, 64, nullptr);
  return cudaGetLastError();
}

int index_overflow(int rows) {
  return one_block(1, 0, [&] {
    volatile int offset = rows * 65536;
    static_cast<void>(offset);
  });
}

int divide_by(int n) {
  return one_block(1, 0, [&] {
    volatile int quotient = 7 / n;
    static_cast<void>(quotient);
  });
}

int deep_recursion(int depth) {
  return one_block(1, 0, [&] {
    const auto down = [](const auto& self, int n) -> int {
      volatile char frame[4096];
      frame[0] = static_cast<char>(n);
      return n == 0 ? 0 : self(self, n - 1) + frame[0];
    };
    down(down, depth);
  });
}

}  // extern "C"
