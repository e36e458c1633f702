// rope_quantize_append: one step's keys and values into the KV cache, and its queries rotated.
//
// Math:     spec 9, 1-5. `serving`: K rotated in the dtype, one scale a token and head. `paper`: K
//           as it is, one scale a token over all heads. Float caches: rotated K and V, cast.
// Shapes:   k, v [n, Hkv, D] and q [n, H, D] with strides of tokens and heads, rotated q [n, H, D],
//           tables [rows, D / 2], cache: kv_cache.h, contiguous or paged.
// Dtypes:   fp32, bf16, fp16 in; int8, packed int4, fp32, bf16, fp16 cache; fp32 scales.
// Tiling:   K and V of a token are different blocks: a decode step has few tokens. `paper`: a block
//           of up to 256 threads a row, as quantize.cu does it, kHeld = 4 vectors a thread in
//           registers (8192 bf16 values; wider rows are read again, from L2). Else a warp a head, a
//           lane a pair of neighbouring columns, 64 columns at a time: a byte of int4 has one
//           writer, whatever D is. Both halves of a head are read twice, the second time from L1.
//           Queries are more blocks of the same launch, a warp a head: a launch of their own takes
//           longer to start than to run.
// Cost:     memory-bound; floor n * Hkv * D * (sizeof(T) + 1) * 2 bytes and the scales, with
//           queries n * H * D * sizeof(T) * 2 more.
// Numerics: exact: RoPE rounds every product and sum to the dtype (rope_value).
// Edges:    n = 0 launches nothing. A place outside the cache is not written; a position outside
//           the tables rotates to NaN (scale NaN, codes 0), queries too.
// Limits:   D even; sm_80.
// Tests:    tests/emulator/test_rope_quantize_append.py
// Bench:    python -m benchmarks.run --op rope_quantize_append --device cuda
#include <climits>

#include "cuda/kv_layout.cuh"
#include "llmqat/int4.h"
#include "llmqat/quant_math.h"
#include "llmqat/reduce.cuh"
#include "llmqat/vec.cuh"

namespace llmqat {
namespace {

constexpr int kMaxAppendThreads = 256;  // append_threads
constexpr int kHeadsPerBlock = 4;       // warps of a block that takes heads
constexpr int kAppendHeld = 4;          // vectors a thread keeps between the two passes

struct AppendArgs {
  LlmqatKvCache cache;
  LlmqatRopeTables tables;
  LlmqatAppend p;
};

// Where token i goes; block -1 if nowhere.
LLMQAT_DEVICE TokenPlace append_place(const AppendArgs& args, int64_t i) {
  const int64_t slot = args.p.slots[i], position = args.p.positions[i];
  const bool inside =
      slot >= 0 && slot < args.cache.slots && position >= 0 && position < slot_capacity(args.cache);
  return inside ? token_place(args.cache, slot, position) : TokenPlace{-1, 0};
}

// kN neighbouring codes of a row, whose bytes have no other writer.
template <int kN>
LLMQAT_DEVICE void store_codes(void* codes, bool packed, int64_t row, int64_t dim, int64_t column,
                               const Vec<int8_t, kN>& v) {
  if (!packed) {
    store_vec(static_cast<int8_t*>(codes) + row * dim + column, v);
    return;
  }
  Vec<uint8_t, kN / 2> bytes;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) bytes.v[i] = pack_pair(v.v[2 * i], v.v[2 * i + 1]);
  store_vec(static_cast<uint8_t*>(codes) + (row * dim + column) / 2, bytes);
}

template <class T>
LLMQAT_DEVICE const T* head_of(const LlmqatHeads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token + head * x.head;
}

// Column c of a head after RoPE, every product and sum rounded to T.
template <class T>
LLMQAT_DEVICE float rope_value(const T* x, int64_t c, int64_t half, const float* cos,
                               const float* sin) {
  const bool first = c < half;
  const int64_t i = first ? c : c - half;
  const float own = to_float(x[c]), other = to_float(x[first ? c + half : i]);
  const float cosine = round_to<T>(cos[i]), sine = round_to<T>(sin[i]);
  const float turned = round_to<T>(mul_rn(first ? -other : other, sine));
  return round_to<T>(add_rn(round_to<T>(mul_rn(own, cosine)), turned));
}

// One head of q by one warp.
template <class T>
LLMQAT_DEVICE void rotate_query(const AppendArgs& args, int64_t token, int64_t head) {
  const int64_t dim = args.cache.head_dim, half = dim / 2, position = args.p.positions[token];
  const T* const x = head_of<T>(args.p.q, token, head);
  T* const y = static_cast<T*>(args.p.q_out) + (token * args.p.q_heads + head) * dim;
  const bool tabled = position >= 0 && position < args.tables.rows;
  const float *const cos = args.tables.cos + position * half, *const sin =
                                                                  args.tables.sin + position * half;
  const float nan = bits_float(0x7FC00000u);
#pragma unroll 2  // a head of 128 columns in one round
  for (int64_t c = threadIdx.x % 32; c < half; c += 32) {
    const float low = tabled ? rope_value(x, c, half, cos, sin) : nan;
    const float high = tabled ? rope_value(x, c + half, half, cos, sin) : nan;
    y[c] = from_float<T>(low);
    y[c + half] = from_float<T>(high);
  }
}

// ---- paper: all heads of a token are one row ----

// Where a column of that row lies; vectors do not cross heads.
LLMQAT_DEVICE int64_t row_offset(const LlmqatHeads& x, int64_t column, int64_t dim) {
  if (x.head == dim) return column;  // without a division before the load
  const int64_t head = column / dim;
  return head * x.head + (column - head * dim);
}

// The widest load when kAligned; otherwise one value at a time.
template <class T, int kN, bool kAligned>
LLMQAT_DEVICE Vec<T, kN> load_values(const T* p) {
  if constexpr (kAligned) {
    return load_vec<T, kN>(p);
  } else {
    Vec<T, kN> x;
#pragma unroll
    for (int i = 0; i < kN; ++i) x.v[i] = p[i];
    return x;
  }
}

template <class T, int kN>
LLMQAT_DEVICE uint32_t largest_magnitude(uint32_t largest, const Vec<T, kN>& x) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t m = magnitude_bits(to_float(x.v[i]));
    largest = m > largest ? m : largest;
  }
  return largest;
}

template <class T, int kN, bool kAligned>
LLMQAT_KERNEL(kMaxAppendThreads)
append_tokens_kernel(AppendArgs args) {
  take_turn();
  const int64_t token = blockIdx.x;
  if (blockIdx.y >= 2) {
    const int64_t head = (blockIdx.y - 2) * (blockDim.x / 32) + threadIdx.x / 32;
    if (head < args.p.q_heads) rotate_query<T>(args, token, head);
    return;
  }
  const bool is_key = blockIdx.y == 0;
  const TokenPlace at = append_place(args, token);
  if (at.block < 0) return;  // the whole block
  const int64_t dim = args.cache.head_dim, columns = args.cache.heads * dim;
  const LlmqatHeads heads = is_key ? args.p.k : args.p.v;
  const T* const x = head_of<T>(heads, token, 0);
  const auto load = [&](int64_t c) {
    return load_values<T, kN, kAligned>(x + row_offset(heads, c * kN, dim));
  };
  void* const codes = is_key ? args.cache.k : args.cache.v;
  float* const scale = is_key ? args.cache.k_scale : args.cache.v_scale;
  const int64_t chunks = columns / kN, stride = blockDim.x;

  Vec<T, kN> held[kAppendHeld];
  uint32_t largest = 0;
#pragma unroll
  for (int h = 0; h < kAppendHeld; ++h) {
    const int64_t c = threadIdx.x + h * stride;
    if (c < chunks) {
      held[h] = load(c);
      largest = largest_magnitude(largest, held[h]);
    }
  }
  for (int64_t c = threadIdx.x + kAppendHeld * stride; c < chunks; c += stride) {
    largest = largest_magnitude(largest, load(c));
  }

  const RowScale row = row_scale(row_max_u32(largest), args.cache.bits, false);
  const float limit = static_cast<float>(qmax(args.cache.bits));
  if (threadIdx.x == 0) scale[scale_index(args.cache, at, 0)] = row.scale;
  const auto write = [&](int64_t c, const Vec<T, kN>& v) {
    Vec<int8_t, kN> out;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      out.v[i] = row.zero ? int8_t{0} : quantize_code(to_float(v.v[i]), row.inv, limit);
    }
    const int64_t head = c * kN / dim;
    store_codes<kN>(codes, args.cache.storage == LLMQAT_KV_INT4, head_row(args.cache, at, head),
                    dim, c * kN - head * dim, out);
  };
#pragma unroll
  for (int h = 0; h < kAppendHeld; ++h) {
    const int64_t c = threadIdx.x + h * stride;
    if (c < chunks) write(c, held[h]);
  }
  for (int64_t c = threadIdx.x + kAppendHeld * stride; c < chunks; c += stride) {
    write(c, load(c));
  }
}

// ---- serving and float caches: a head of a token is a row ----

LLMQAT_DEVICE void store_cached(void* x, int storage, int64_t i, float v) {
  if (storage == LLMQAT_KV_FLOAT32) {
    static_cast<float*>(x)[i] = v;
  } else if (storage == LLMQAT_KV_BFLOAT16) {
    static_cast<bf16*>(x)[i] = to_bf16(v);
  } else {
    static_cast<fp16*>(x)[i] = to_fp16(v);
  }
}

template <class T>
LLMQAT_KERNEL(32 * kHeadsPerBlock)
append_heads_kernel(AppendArgs args) {
  take_turn();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kHeadsPerBlock + threadIdx.y;
  const int64_t rows = args.p.n * args.cache.heads;
  if (row >= rows) return;  // whole warps
  if (blockIdx.y >= 2) {
    const int64_t query = (blockIdx.y - 2) * rows + row;  // as many a block as there are keys
    rotate_query<T>(args, query / args.p.q_heads, query % args.p.q_heads);
    return;
  }
  const int64_t token = row / args.cache.heads, head = row % args.cache.heads;
  const bool is_key = blockIdx.y == 0;
  const TokenPlace at = append_place(args, token);
  if (at.block < 0) return;
  const int64_t dim = args.cache.head_dim, half = dim / 2;
  const int64_t position = args.p.positions[token];
  const T* const x = head_of<T>(is_key ? args.p.k : args.p.v, token, head);
  void* const codes = is_key ? args.cache.k : args.cache.v;
  const float *const cos = args.tables.cos + position * half, *const sin =
                                                                  args.tables.sin + position * half;
  const bool tabled = position < args.tables.rows;
  const auto value = [&](int64_t c) {
    if (!is_key) return to_float(x[c]);
    return tabled ? rope_value(x, c, half, cos, sin) : bits_float(0x7FC00000u);
  };
  const int64_t to = head_row(args.cache, at, head);
  const int storage = args.cache.storage;

  if (storage != LLMQAT_KV_INT8 && storage != LLMQAT_KV_INT4) {
    for (int64_t c = threadIdx.x; c < dim; c += 32) {
      store_cached(codes, storage, to * dim + c, value(c));
    }
    return;
  }
  uint32_t largest = 0;
  for (int64_t c = threadIdx.x; c < dim; c += 32) {
    const uint32_t m = magnitude_bits(value(c));
    largest = m > largest ? m : largest;
  }
  const RowScale scale = row_scale(row_max_u32(largest), args.cache.bits, false);
  const float limit = static_cast<float>(qmax(args.cache.bits));
  if (threadIdx.x == 0) {
    (is_key ? args.cache.k_scale : args.cache.v_scale)[scale_index(args.cache, at, head)] =
        scale.scale;
  }
  for (int64_t c = 2 * threadIdx.x; c < dim; c += 64) {
    Vec<int8_t, 2> out{};
    if (!scale.zero) {
      out = {{quantize_code(value(c), scale.inv, limit),
              quantize_code(value(c + 1), scale.inv, limit)}};
    }
    store_codes<2>(codes, storage == LLMQAT_KV_INT4, to, dim, c, out);
  }
}

// ---- launch ----

constexpr int64_t kMaxQueryBlocks = 65533;  // of the grid's y, beside those of K and of V

template <class T, int kN, bool kAligned>
int launch_tokens(const AppendArgs& args, void* stream) {
  const int64_t columns = args.cache.heads * args.cache.head_dim;
  const int64_t threads = append_threads(columns, kN), heads = threads / 32;
  const int64_t queries = (args.p.q_heads + heads - 1) / heads;
  if (queries > kMaxQueryBlocks) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(args.p.n), static_cast<unsigned>(2 + queries));
  const dim3 block(static_cast<unsigned>(threads));
  LLMQAT_LAUNCH((append_tokens_kernel<T, kN, kAligned>), grid, block, stream, args);
  return cudaGetLastError();
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every head begins at a multiple of 16 bytes, which hold kN values.
template <int kN>
bool is_aligned(const LlmqatHeads& x) {
  return is_aligned(x.data) && x.token % kN == 0 && x.head % kN == 0;
}

template <class T>
int launch_append(const AppendArgs& args, void* stream) {
  if (args.cache.pre_rope) {
    constexpr int kN = 16 / sizeof(T);
    const bool aligned = args.cache.head_dim % kN == 0 && is_aligned<kN>(args.p.k) &&
                         is_aligned<kN>(args.p.v) && is_aligned(args.cache.k) &&
                         is_aligned(args.cache.v);
    return aligned ? launch_tokens<T, kN, true>(args, stream)
                   : launch_tokens<T, 2, false>(args, stream);
  }
  const int64_t blocks = (args.p.n * args.cache.heads + kHeadsPerBlock - 1) / kHeadsPerBlock;
  const int64_t queries = args.p.q_heads / args.cache.heads;
  if (blocks > INT_MAX || queries > kMaxQueryBlocks) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(2 + queries));
  LLMQAT_LAUNCH(append_heads_kernel<T>, grid, dim3(32, kHeadsPerBlock), stream, args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace llmqat

extern "C" int llmqat_cuda_rope_quantize_append(const LlmqatKvCache* cache,
                                                const LlmqatAppend* problem,
                                                const LlmqatRopeTables* tables, void* stream) {
  if (problem->n == 0 || cache->heads == 0 || cache->head_dim == 0) return cudaSuccess;
  if (problem->n > INT_MAX) return cudaErrorInvalidValue;
  llmqat::AppendArgs args{*cache, *tables, *problem};
  if (problem->q_out == nullptr) args.p.q_heads = 0;
  switch (problem->dtype) {
    case LLMQAT_FLOAT32: return llmqat::launch_append<float>(args, stream);
    case LLMQAT_BFLOAT16: return llmqat::launch_append<llmqat::bf16>(args, stream);
    case LLMQAT_FLOAT16: return llmqat::launch_append<llmqat::fp16>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}
