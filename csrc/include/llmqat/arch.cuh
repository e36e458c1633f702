// What CUDA kernels need from the compiler and the machine, each behind one name, so that the
// emulator in tests/emulator can supply its own. Inline PTX may appear in this file only: one
// wrapper per instruction, named by what it does. The instructions need sm_80.
//
// Warp-wide functions need all 32 lanes of a warp at the same call. Fragments are 32-bit registers
// in the layouts of the PTX manual. Packed 16-bit values lie in a uint32_t, element 0 low.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace llmqat {

// 16 bytes moved by one instruction.
struct alignas(16) Word4 {
  uint32_t v[4];
};

}  // namespace llmqat

#if defined(LLMQAT_EMULATED)
#include "emulated/arch.h"  // tests/emulator
#else

#define LLMQAT_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define LLMQAT_KERNEL_MIN_BLOCKS(threads, blocks_per_sm) \
  __global__ void __launch_bounds__(threads, blocks_per_sm)
#define LLMQAT_DEVICE __device__ __forceinline__

// A static array in shared memory. New kernels carve theirs from LLMQAT_DYNAMIC_SHARED.
#define LLMQAT_STATIC_SHARED(type, name, count) __shared__ type name[count]

// Declares `unsigned char* name`: the block's dynamic shared memory, 128-byte aligned.
#define LLMQAT_DYNAMIC_SHARED(name)                                       \
  extern __shared__ __align__(128) unsigned char llmqat_dynamic_shared[]; \
  unsigned char* const name = llmqat_dynamic_shared

// A kernel whose name holds a comma goes in parentheses. Errors are read by cudaGetLastError.
#define LLMQAT_LAUNCH(kernel, grid, block, stream, ...) \
  ::llmqat::launch_kernel(kernel, grid, block, 0, stream, __VA_ARGS__)
#define LLMQAT_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  ::llmqat::launch_kernel(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// Blocks of a kernel that fit on one SM of the current device at the same time; 0 if none does.
#define LLMQAT_RESIDENT_BLOCKS(kernel, threads, shared_bytes) \
  ::llmqat::resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared_bytes)

// Whether the code being compiled may use mma_m16n8k64_s4. On sm_90 that instruction is a slow
// call into emulation code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LLMQAT_HAS_INT4_MMA 0
#else
#define LLMQAT_HAS_INT4_MMA 1
#endif

namespace llmqat {

inline constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// Lets a kernel use more than the 48 KiB that every kernel may; false leaves a CUDA error.
inline bool allow_shared(const void* kernel, size_t bytes) {
  return bytes <= 48 * 1024 ||
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes)) == cudaSuccess;
}

inline int resident_blocks(const void* kernel, int threads, size_t shared_bytes) {
  int blocks = 0;
  if (!allow_shared(kernel, shared_bytes)) return 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  return blocks;
}

// Whether kernels may start before the one before them in the stream has ended: asked for, and the
// current device can (docs/runtime.md).
inline bool overlaps_launches() {
  static const bool wanted = [] {
    const char* const value = std::getenv("LLMQAT_PDL");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  int device = 0, major = 0;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Every launch of this library.
template <class... P>
void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   std::type_identity_t<P>... args) {
  if (!allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes)) return;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = overlaps_launches() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args...);
}

// ---- memory ----

LLMQAT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Global data that is read once: not kept in L1, read through the read-only path.
LLMQAT_DEVICE Word4 load_streaming_16(const void* p) {
  Word4 w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(__cvta_generic_to_global(p)));
  return w;
}

// Global or shared memory, 16-byte aligned: the compiler knows which and picks ld.v4 / st.v4.
LLMQAT_DEVICE Word4 load_16(const void* p) {
  const uint4 w = *static_cast<const uint4*>(p);
  return Word4{{w.x, w.y, w.z, w.w}};
}

LLMQAT_DEVICE void store_16(void* p, Word4 w) {
  *static_cast<uint4*>(p) = make_uint4(w.v[0], w.v[1], w.v[2], w.v[3]);
}

// 16 bytes from global to shared memory past the registers and L1; zeros when not valid (global is
// not read then). They are there after cp_async_wait in this thread, and a barrier for the others.
LLMQAT_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

LLMQAT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kGroups of the latest committed groups are under way.
template <int kGroups>
LLMQAT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

LLMQAT_DEVICE int32_t atomic_add_s32(int32_t* global, int32_t v) { return atomicAdd(global, v); }
LLMQAT_DEVICE uint32_t atomic_add_u32(uint32_t* global, uint32_t v) { return atomicAdd(global, v); }
LLMQAT_DEVICE uint32_t atomic_max_u32(uint32_t* global, uint32_t v) { return atomicMax(global, v); }

LLMQAT_DEVICE void reduce_add_s32(int32_t* global, int32_t v) {
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(v)
               : "memory");
}

// Orders this thread's writes before its later ones for the whole device.
LLMQAT_DEVICE void thread_fence() { __threadfence(); }

// A hint: the 128 bytes around p will be read. L2 is where writes meet, so that it may come before
// griddepcontrol_wait, whoever writes there. Nothing below sm_90, which has nothing to wait for.
LLMQAT_DEVICE void prefetch_l2([[maybe_unused]] const void* p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// ---- launches ----

// From here on the next kernel of the stream may start, once every block came here or ended. It
// will have to wait for this one before it touches memory.
LLMQAT_DEVICE void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the kernels before this one in the stream have ended and what they wrote is there. Every
// thread of every kernel comes here, before it reads or writes global memory: a kernel that ended
// without would let its successor run beside its predecessor.
LLMQAT_DEVICE void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- threads ----

LLMQAT_DEVICE void sync_block() { __syncthreads(); }
LLMQAT_DEVICE void sync_warp() { __syncwarp(); }

// T is uint32_t, int32_t or float.
template <class T>
LLMQAT_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(kFullWarp, v, lane);
}

template <class T>
LLMQAT_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(kFullWarp, v, mask);
}

// From lane + n; the last n lanes keep their own.
template <class T>
LLMQAT_DEVICE T shuffle_down(T v, int n) {
  return __shfl_down_sync(kFullWarp, v, n);
}

LLMQAT_DEVICE uint32_t ballot(bool v) { return __ballot_sync(kFullWarp, v); }

// redux.sync: over a full warp, in every lane.
LLMQAT_DEVICE uint32_t redux_max_u32(uint32_t v) { return __reduce_max_sync(kFullWarp, v); }
LLMQAT_DEVICE int32_t redux_add_s32(int32_t v) { return __reduce_add_sync(kFullWarp, v); }

// ---- tensor cores ----

// 8 x 8 matrices of 16-bit values from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8 and gets of each matrix the two values of row lane / 4, columns 2 * (lane % 4).
LLMQAT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Addresses of lanes 0 to 15.
LLMQAT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Each matrix transposed on the way.
LLMQAT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// acc[16, 8] += a[16, k] @ b[k, 8]. The integer ones are exact, modulo 2^32.
LLMQAT_DEVICE void mma_m16n8k32_s8(int32_t (&acc)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if LLMQAT_HAS_INT4_MMA
LLMQAT_DEVICE void mma_m16n8k64_s4(int32_t (&acc)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

LLMQAT_DEVICE void mma_m16n8k16_f16(float (&acc)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LLMQAT_DEVICE void mma_m16n8k16_bf16(float (&acc)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic on registers ----

// Byte i of the result is byte (selector >> 4 * i) & 7 of the eight bytes b:a (a low); bit 3 of the
// selector's nibble repeats that byte's sign instead.
LLMQAT_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Any boolean function of three words: kTable is f(0xF0, 0xCC, 0xAA).
template <int kTable>
LLMQAT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// c + the dot product of four int8 pairs.
LLMQAT_DEVICE int32_t dot4_s8(uint32_t a, uint32_t b, int32_t c) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}

// Two fp16 (half2) or bf16 (bf162) at once, each rounded once to nearest even.
LLMQAT_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

LLMQAT_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

LLMQAT_DEVICE uint32_t half2_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

LLMQAT_DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The sign alone: the compiler folds it into the instruction that reads the result.
LLMQAT_DEVICE uint32_t half2_neg(uint32_t a) {
  uint32_t d;
  asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Two floats to fp16, rounded to nearest even.
LLMQAT_DEVICE uint32_t half2_pack(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

LLMQAT_DEVICE uint32_t bf162_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// sm_80 has no multiply: adding -0 changes no product.
LLMQAT_DEVICE uint32_t bf162_mul(uint32_t a, uint32_t b) { return bf162_fma(a, b, 0x80008000u); }

// 2^v within 2 ulp; denormal results are kept.
LLMQAT_DEVICE float exp2_approx(float v) {
  float d;
  asm("ex2.approx.f32 %0, %1;" : "=f"(d) : "f"(v));
  return d;
}

}  // namespace llmqat

#endif

namespace llmqat {

// How a kernel begins that can do nothing useful before its turn.
LLMQAT_DEVICE void take_turn() {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
}

}  // namespace llmqat
