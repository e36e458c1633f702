// Rows of one step over the KV cache: RoPE, the write, and attention in tiles.
//
// Math:     spec 9; the arithmetic is that of rope.h, rows.h and attention.h.
// Shapes:   cache [S, Hkv, T, D]; rows [n, heads, D].
// Dtypes:   rows fp32, bf16, fp16; cache int8, packed int4, fp32, bf16, fp16.
// Tiling:   attention: neighbouring rows of one slot and the query heads of one KV head are one
//           call, so that a prefill reads a head once for up to 32 queries.
// Cost:     see attention.cpp.
// Numerics: that of the row kernels: a row's bits depend on no other row.
// Edges:    n = 0 does nothing.
// Limits:   indices and sizes were checked by the binding.
// Tests:    tests/kernels/test_rope_quantize_append_spec.py, test_attention_decode_spec.py
// Bench:    python -m benchmarks.run --op attention_decode
#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "int4_rows.h"
#include "rope.h"
#include "rows.h"
#include "scratch.h"

namespace llmqat::cpu {
namespace {

thread_local Scratch<int8_t> t_codes;
thread_local Scratch<float> t_attention;

// Calls f with a value of the element type of the cache; uint8_t stands for packed int4.
template <class F>
void with_type(CacheType type, const F& f) {
  switch (type) {
    case CacheType::int8: return f(int8_t{});
    case CacheType::int4: return f(uint8_t{});
    case CacheType::float32: return f(float{});
    case CacheType::bfloat16: return f(bf16{});
    case CacheType::float16: return f(fp16{});
  }
}

// Quantizes one token's row of all heads and writes it.
template <class T>
void write_codes(const KvCache& cache, const T* x, int64_t slot, int64_t position, void* to,
                 float* scale) {
  const int64_t d = cache.head_dim;
  const int64_t rows = cache.pre_rope ? 1 : cache.heads;
  const int64_t length = cache.pre_rope ? cache.heads * d : d;
  int8_t* codes = t_codes.get(cache.heads * d);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (cache.pre_rope ? slot : slot * cache.heads + r) * cache.tokens + position;
    scale[at] = quantize_row(x + r * length, length, cache.bits, false, codes + r * length);
  }
  for (int64_t h = 0; h < cache.heads; ++h) {
    const int64_t at = ((slot * cache.heads + h) * cache.tokens + position) * cache.row;
    if (cache.type == CacheType::int4) {
      pack_row(codes + h * d, d, static_cast<uint8_t*>(to) + at);
    } else {
      std::memcpy(static_cast<int8_t*>(to) + at, codes + h * d, static_cast<size_t>(d));
    }
  }
}

template <class T, class C>
void write_floats(const KvCache& cache, const T* x, int64_t slot, int64_t position, C* codes) {
  for (int64_t h = 0; h < cache.heads; ++h) {
    C* to = codes + ((slot * cache.heads + h) * cache.tokens + position) * cache.row;
    const T* from = x + h * cache.head_dim;
    for (int64_t i = 0; i < cache.head_dim; ++i) to[i] = from_float<C>(to_float(from[i]));
  }
}

template <class T>
void write_token(const KvCache& cache, const T* k, const T* v, int64_t slot, int64_t position) {
  if (cache.quantized()) {
    write_codes(cache, k, slot, position, cache.k, cache.k_scale);
    write_codes(cache, v, slot, position, cache.v, cache.v_scale);
    return;
  }
  with_type(cache.type, [&](auto tag) {
    using C = decltype(tag);
    if constexpr (sizeof(C) > 1) {
      write_floats(cache, k, slot, position, static_cast<C*>(cache.k));
      write_floats(cache, v, slot, position, static_cast<C*>(cache.v));
    }
  });
}

// Neighbouring queries of one slot and some query heads of one KV head: one call of attend().
struct Tile {
  int64_t first_query, queries, first_head, heads;
};

thread_local std::vector<Tile> t_tiles;

// The tiles live until the thread's next call.
const std::vector<Tile>& make_tiles(const int64_t* slots, int64_t n, int64_t group) {
  const int64_t heads = std::min(group, kAttentionRows);
  const int64_t most = kAttentionRows / heads;
  t_tiles.clear();
  for (int64_t i = 0; i < n;) {
    int64_t count = 1;
    while (count < most && i + count < n && slots[i + count] == slots[i]) ++count;
    for (int64_t h = 0; h < group; h += heads)
      t_tiles.push_back({i, count, h, std::min(heads, group - h)});
    i += count;
  }
  return t_tiles;
}

template <class T, class C>
void attend_typed(const Parallel& parallel, const KvCache& cache, const T* q, int64_t n,
                  int64_t heads, const RopeTables& tables, const int64_t* slots,
                  const int64_t* lengths, float scaling, T* out) {
  const int64_t d = cache.head_dim, group = heads / cache.heads;
  const std::vector<Tile>& tiles = make_tiles(slots, n, group);
  const int64_t longest = *std::max_element(lengths, lengths + n);
  const int64_t tasks = static_cast<int64_t>(tiles.size()) * cache.heads;
  // A token costs about as much as moving 16 bytes for each of its head_dim values.
  parallel.rows(tasks, longest * d * 16, [&](int64_t begin, int64_t end) {
    float* scratch = t_attention.get(attention_scratch(d));
    int64_t offsets[kAttentionRows], own[kAttentionRows];
    for (int64_t task = begin; task < end; ++task) {
      const Tile& tile = tiles[static_cast<size_t>(task / cache.heads)];
      const int64_t kv_head = task % cache.heads, slot = slots[tile.first_query];
      int64_t rows = 0;
      for (int64_t i = tile.first_query; i < tile.first_query + tile.queries; ++i) {
        for (int64_t h = 0; h < tile.heads; ++h, ++rows) {
          offsets[rows] = (i * heads + kv_head * group + tile.first_head + h) * d;
          own[rows] = lengths[i];
        }
      }
      const int64_t head = slot * cache.heads + kv_head;
      const int64_t at = head * cache.tokens * cache.row;
      const int64_t scale_row = (cache.pre_rope ? slot : head) * cache.tokens;
      const bool quantized = cache.quantized(), rotates = cache.rotates_on_read();
      const CachedHead<C> cached{static_cast<const C*>(cache.k) + at,
                                 static_cast<const C*>(cache.v) + at,
                                 quantized ? cache.k_scale + scale_row : nullptr,
                                 quantized ? cache.v_scale + scale_row : nullptr,
                                 rotates ? tables.cos : nullptr,
                                 rotates ? tables.sin : nullptr,
                                 d,
                                 cache.row};
      attend(cached, q, offsets, own, rows, scaling, out, scratch);
    }
  });
}

}  // namespace

template <class T>
void rope_rows(const Parallel& parallel, const T* x, int64_t stride, int64_t n, int64_t heads,
               int64_t head_dim, const RopeTables& tables, const int64_t* positions, T* out) {
  const int64_t row = heads * head_dim;
  parallel.rows(n, row * 2 * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = positions[i] * (head_dim / 2);
      rope_heads(x + i * stride, heads, head_dim, tables.cos + at, tables.sin + at, out + i * row);
    }
  });
}

template <class T>
void append_rows(const Parallel& parallel, const KvCache& cache, const T* k, const T* v,
                 int64_t stride, int64_t n, const RopeTables& tables, const int64_t* slots,
                 const int64_t* positions) {
  const int64_t row = cache.heads * cache.head_dim;
  parallel.rows(n, row * 2 * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    thread_local Scratch<T> t_rotated;
    T* rotated = cache.rotates_on_write() ? t_rotated.get(row) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const T* key = k + i * stride;
      if (rotated != nullptr) {
        const int64_t at = positions[i] * (cache.head_dim / 2);
        rope_heads(key, cache.heads, cache.head_dim, tables.cos + at, tables.sin + at, rotated);
        key = rotated;
      }
      write_token(cache, key, v + i * stride, slots[i], positions[i]);
    }
  });
}

template <class T>
void attend_rows(const Parallel& parallel, const KvCache& cache, const T* q, int64_t n,
                 int64_t heads, const RopeTables& tables, const int64_t* slots,
                 const int64_t* lengths, float scaling, T* out) {
  if (n == 0) return;
  with_type(cache.type, [&](auto tag) {
    attend_typed<T, decltype(tag)>(parallel, cache, q, n, heads, tables, slots, lengths, scaling,
                                   out);
  });
}

#define LLMQAT_INSTANTIATE(T)                                                                \
  template void rope_rows<T>(const Parallel&, const T*, int64_t, int64_t, int64_t, int64_t,  \
                             const RopeTables&, const int64_t*, T*);                         \
  template void append_rows<T>(const Parallel&, const KvCache&, const T*, const T*, int64_t, \
                               int64_t, const RopeTables&, const int64_t*, const int64_t*);  \
  template void attend_rows<T>(const Parallel&, const KvCache&, const T*, int64_t, int64_t,  \
                               const RopeTables&, const int64_t*, const int64_t*, float, T*);
LLMQAT_INSTANTIATE(float)
LLMQAT_INSTANTIATE(bf16)
LLMQAT_INSTANTIATE(fp16)
#undef LLMQAT_INSTANTIATE

}  // namespace llmqat::cpu
