// Each wrapper of arch.cuh alone: one warp, in[32][16] words, out[32][8] words, a row a lane.
// Compiled for the emulator and, where there is a device, by nvcc (test_instructions.py).
#include "llmqat/arch.cuh"

namespace llmqat {

LLMQAT_DEVICE float as_float(uint32_t v) {
  union {
    uint32_t u;
    float f;
  } both{v};
  return both.f;
}

LLMQAT_DEVICE uint32_t as_word(float v) {
  union {
    float f;
    uint32_t u;
  } both{v};
  return both.u;
}

}  // namespace llmqat

#define PROBE(name, ...)                                                                  \
  namespace llmqat {                                                                      \
  LLMQAT_KERNEL(32) name##_kernel(const uint32_t* in, uint32_t* out) {                    \
    take_turn();                                                                          \
    uint32_t x[16], y[8] = {};                                                            \
    for (int i = 0; i < 16; ++i) x[i] = in[threadIdx.x * 16 + i];                         \
    [[maybe_unused]] const uint32_t a[4] = {x[0], x[1], x[2], x[3]}, b[2] = {x[4], x[5]}; \
    __VA_ARGS__                                                                           \
    for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = y[i];                          \
  }                                                                                       \
  }                                                                                       \
  extern "C" int name(const uint32_t* in, uint32_t* out) {                                \
    LLMQAT_LAUNCH_SHARED(llmqat::name##_kernel, 1, 32, 4096, nullptr, in, out);           \
    return cudaGetLastError();                                                            \
  }

// a = in[0..3], b = in[4..5], acc = in[6..9].
#define MMA(name, Acc, from, to)                                               \
  PROBE(name, Acc acc[4]; for (int i = 0; i < 4; ++i) acc[i] = from(x[6 + i]); \
        mma_##name(acc, a, b); for (int i = 0; i < 4; ++i) y[i] = to(acc[i]);)

MMA(m16n8k32_s8, int32_t, static_cast<int32_t>, static_cast<uint32_t>)
#if LLMQAT_HAS_INT4_MMA && !defined(LLMQAT_NO_INT4_PROBE)  // nvcc's host pass has no architecture
MMA(m16n8k64_s4, int32_t, static_cast<int32_t>, static_cast<uint32_t>)
#endif
MMA(m16n8k16_f16, float, as_float, as_word)
MMA(m16n8k16_bf16, float, as_float, as_word)

// Shared memory holds what the lanes have in x[0..15], 64 bytes a lane; x[0] is also the row's
// byte offset.
#define FILL                                                                                  \
  LLMQAT_DYNAMIC_SHARED(shared);                                                              \
  for (int i = 0; i < 16; i += 4) {                                                           \
    store_16(shared + threadIdx.x * 64 + i * 4, Word4{{x[i], x[i + 1], x[i + 2], x[i + 3]}}); \
  }                                                                                           \
  sync_warp();                                                                                \
  const unsigned char* row = shared + x[0];

PROBE(probe_ldmatrix_x4, FILL uint32_t r[4]; ldmatrix_x4(r, row);
      for (int i = 0; i < 4; ++i) y[i] = r[i];)
PROBE(probe_ldmatrix_x2, FILL uint32_t r[2]; ldmatrix_x2(r, row); y[0] = r[0]; y[1] = r[1];)
PROBE(probe_ldmatrix_x4_trans, FILL uint32_t r[4]; ldmatrix_x4_trans(r, row);
      for (int i = 0; i < 4; ++i) y[i] = r[i];)

// 16 bytes of in through shared memory to the next lane; the odd lanes' copies are not valid.
PROBE(probe_cp_async, LLMQAT_DYNAMIC_SHARED(shared); const unsigned lane = threadIdx.x;
      cp_async_16(shared + lane * 16, in + lane * 16, lane % 2 == 0); cp_async_commit();
      cp_async_16(shared + 512 + lane * 16, in + lane * 16 + 4, true); cp_async_commit();
      cp_async_wait<1>(); sync_block(); const Word4 first = load_16(shared + (lane + 1) % 32 * 16);
      cp_async_wait<0>(); sync_block();
      const Word4 second = load_16(shared + 512 + (lane ^ 1) * 16);
      for (int i = 0; i < 4; ++i) y[i] = first.v[i], y[4 + i] = second.v[i];)
PROBE(probe_load, prefetch_l2(in);
      const Word4 w = load_streaming_16(in + (threadIdx.x ^ 3) * 16);
      const Word4 v = load_16(in + threadIdx.x * 16 + 8);
      for (int i = 0; i < 4; ++i) y[i] = w.v[i], y[4 + i] = v.v[i];)
// out[0..5] of lane 0 start at 0; every lane returns what it saw.
PROBE(probe_atomics, int32_t* const sums = reinterpret_cast<int32_t*>(out);
      const int32_t v = static_cast<int32_t>(x[0]); if (threadIdx.x < 4) out[threadIdx.x] = 0;
      sync_warp(); const int32_t s = atomic_add_s32(sums, v); reduce_add_s32(sums + 1, v);
      const uint32_t t = atomic_add_u32(out + 2, 1);
      const uint32_t m = atomic_max_u32(out + 3, x[1]); thread_fence(); sync_warp();
      for (int i = 0; i < 4; ++i) y[i] = out[i]; y[4] = static_cast<uint32_t>(s); y[5] = t;
      y[6] = m; sync_warp();)

PROBE(probe_shuffle, const int lane = static_cast<int>(threadIdx.x);
      y[0] = shuffle(x[0], static_cast<int>(x[1])); y[1] = shuffle_xor(x[0], 5);
      y[2] = shuffle_down(x[0], 3);
      y[3] = static_cast<uint32_t>(shuffle(static_cast<int32_t>(x[0]), 31 - lane));
      y[4] = as_word(shuffle_xor(as_float(x[0]), 16)); y[5] = ballot((x[2] & 1) != 0);
      y[6] = redux_max_u32(x[3]);
      y[7] = static_cast<uint32_t>(redux_add_s32(static_cast<int32_t>(x[4])));)
PROBE(probe_words, y[0] = byte_permute(x[0], x[1], x[2]); y[1] = lop3<0xEA>(x[0], x[1], x[2]);
      y[2] = lop3<0x6C>(x[0], x[1], x[2]);
      y[3] = static_cast<uint32_t>(dot4_s8(x[0], x[1], static_cast<int32_t>(x[2])));
      y[4] = as_word(exp2_approx(as_float(x[3])));)
PROBE(probe_half2, y[0] = half2_fma(x[0], x[1], x[2]); y[1] = half2_mul(x[0], x[1]);
      y[2] = half2_add(x[0], x[1]); y[3] = half2_sub(x[0], x[1]);
      y[4] = bf162_fma(x[3], x[4], x[5]); y[5] = bf162_mul(x[3], x[4]);)
