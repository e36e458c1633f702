// RoPE, the write into the KV cache, and attention over it.
#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "checks.h"
#include "cpu/int4_rows.h"
#include "cpu/rope.h"
#include "cpu/rows.h"

namespace llmqat::bindings {
namespace {

// Shapes and flags of a cache [S, Hkv, T, D] after its checks (spec 9).
struct Cache {
  int64_t slots, heads, tokens, head_dim, row;  // row: elements of one token of one head
  int bits;
  bool quantized, per_token;  // per_token: one scale per token over all heads
};

void check_scale(const Tensor& scale, const Cache& cache, const char* name) {
  check_cpu(scale, name);
  if (!cache.quantized) return;
  check_dtype(scale, ScalarType::Float, name);
  check_contiguous(scale, name);
  if (cache.per_token) {
    check_shape(scale, {cache.slots, cache.tokens}, name);
  } else {
    check_shape(scale, {cache.slots, cache.heads, cache.tokens}, name);
  }
}

Cache check_cache(const Tensor& k_codes, const Tensor& k_scale, const Tensor& v_codes,
                  const Tensor& v_scale, int64_t head_dim, int64_t bits, bool pre_rope) {
  const bool quantized = bits != 16 && bits != 32;
  if (quantized) check_bits(bits, "bits");
  check_cpu(k_codes, "k_codes");
  check_cpu(v_codes, "v_codes");
  check_dim(k_codes, 4, "k_codes");
  const bool packed = k_codes.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, "head_dim: expected an even size, got ",
                  head_dim);
  if (!quantized) {
    check_float_dtype(k_codes.scalar_type(), "k_codes");
  } else if (packed) {
    STD_TORCH_CHECK(bits <= 4, "k_codes: packed uint8 holds at most 4 bits, got bits=", bits);
  } else {
    check_dtype(k_codes, ScalarType::Char, "k_codes");
  }
  const Cache cache{k_codes.size(0),
                    k_codes.size(1),
                    k_codes.size(2),
                    head_dim,
                    packed ? head_dim / 2 : head_dim,
                    static_cast<int>(bits),
                    quantized,
                    pre_rope};
  for (const auto& [codes, name] :
       {std::pair{&k_codes, "k_codes"}, std::pair{&v_codes, "v_codes"}}) {
    check_dtype(*codes, k_codes.scalar_type(), name);
    check_shape(*codes, {cache.slots, cache.heads, cache.tokens, cache.row}, name);
    check_contiguous(*codes, name);
  }
  check_scale(k_scale, cache, "k_scale");
  check_scale(v_scale, cache, "v_scale");
  return cache;
}

// int64 [n] with values in [0, limit), or [0, limit] where the limit itself is allowed.
Tensor check_indices(const Tensor& index_, int64_t n, int64_t limit, bool inclusive,
                     const char* name) {
  check_cpu(index_, name);
  check_dtype(index_, ScalarType::Long, name);
  check_shape(index_, {n}, name);
  const Tensor index = as_contiguous(index_);
  const int64_t* values = data<int64_t>(index);
  const int64_t top = inclusive ? limit : limit - 1;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] <= top, name, ": ", values[i], " at index ", i,
                    " is outside 0..", top);
  }
  return index;
}

Tensor check_table(const Tensor& table, int64_t rows, int64_t half, const char* name) {
  check_cpu(table, name);
  check_dtype(table, ScalarType::Float, name);
  check_shape(table, {-1, half}, name);
  STD_TORCH_CHECK(table.size(0) >= rows, name, ": expected at least ", rows, " rows, got ",
                  table.size(0));
  return as_contiguous(table);
}

Tensor rope(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_) {
  check_cpu(x_, "x");
  check_dim(x_, 3, "x");
  const int64_t n = x_.size(0), heads = x_.size(1), dim = x_.size(2);
  STD_TORCH_CHECK(dim % 2 == 0, "x: expected an even head dimension, got ", dim);
  const Tensor cos = check_table(cos_, 0, dim / 2, "cos");
  const Tensor sin = check_table(sin_, cos.size(0), dim / 2, "sin");
  const Tensor positions = check_indices(positions_, n, cos.size(0), false, "positions");
  const Tensor x = as_contiguous(x_);
  Tensor y = new_empty(x, sizes_of(x), x.scalar_type());
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    const int64_t row = heads * dim;
    parallel_rows(n, row * 2 * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = data<int64_t>(positions)[i] * (dim / 2);
        cpu::rope_heads(from + i * row, heads, dim, data<float>(cos) + at, data<float>(sin) + at,
                        to + i * row);
      }
    });
  });
  return y;
}

// Writes one token of K or V, heads x head_dim values of T, to (slot, position) of the cache.
template <class T>
void write_token(const Cache& cache, const T* x, int64_t slot, int64_t position,
                 const Tensor& codes_cache, const Tensor& scale_cache, int8_t* codes) {
  const int64_t d = cache.head_dim;
  const int64_t rows = cache.per_token ? 1 : cache.heads,
                length = cache.per_token ? cache.heads * d : d;
  float* scale = mutable_data<float>(scale_cache);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (cache.per_token ? slot : slot * cache.heads + r) * cache.tokens + position;
    scale[at] = cpu::quantize_row(x + r * length, length, cache.bits, false, codes + r * length);
  }
  for (int64_t h = 0; h < cache.heads; ++h) {
    const int64_t at = ((slot * cache.heads + h) * cache.tokens + position) * cache.row;
    if (codes_cache.scalar_type() == ScalarType::Byte) {
      cpu::pack_row(codes + h * d, d, mutable_data<uint8_t>(codes_cache) + at);
    } else {
      std::memcpy(mutable_data<int8_t>(codes_cache) + at, codes + h * d, static_cast<size_t>(d));
    }
  }
}

template <class T>
void write_float_token(const Cache& cache, const T* x, int64_t slot, int64_t position,
                       const Tensor& target) {
  dispatch_float(target.scalar_type(), "k_codes", [&](auto tag) {
    using C = decltype(tag);
    for (int64_t h = 0; h < cache.heads; ++h) {
      C* to = mutable_data<C>(target) +
              ((slot * cache.heads + h) * cache.tokens + position) * cache.row;
      const T* from = x + h * cache.head_dim;
      for (int64_t i = 0; i < cache.head_dim; ++i) to[i] = from_float<C>(to_float(from[i]));
    }
  });
}

void rope_quantize_append(const Tensor& k_, const Tensor& v_, const Tensor& cos_,
                          const Tensor& sin_, Tensor k_codes, Tensor k_scale, Tensor v_codes,
                          Tensor v_scale, const Tensor& slots_, const Tensor& positions_,
                          int64_t bits, bool pre_rope) {
  check_cpu(k_, "k");
  check_cpu(v_, "v");
  check_dim(k_, 3, "k");
  const int64_t n = k_.size(0), dim = k_.size(2);
  const Cache cache = check_cache(k_codes, k_scale, v_codes, v_scale, dim, bits, pre_rope);
  check_shape(k_, {n, cache.heads, dim}, "k");
  check_shape(v_, {n, cache.heads, dim}, "v");
  check_dtype(v_, k_.scalar_type(), "v");
  const Tensor slots = check_indices(slots_, n, cache.slots, false, "slots");
  const Tensor positions = check_indices(positions_, n, cache.tokens, false, "positions");
  const bool rotates = !(cache.quantized && pre_rope);
  int64_t table_rows = 0;
  for (int64_t i = 0; rotates && i < n; ++i) {
    table_rows = std::max(table_rows, data<int64_t>(positions)[i] + 1);
  }
  const Tensor cos = check_table(cos_, table_rows, dim / 2, "cos");
  const Tensor sin = check_table(sin_, table_rows, dim / 2, "sin");
  const Tensor k = as_contiguous(k_), v = as_contiguous(v_);
  dispatch_float(k.scalar_type(), "k", [&](auto tag) {
    using T = decltype(tag);
    const int64_t row = cache.heads * dim;
    parallel_rows(n, row * 2 * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
      const auto rotated = std::make_unique_for_overwrite<T[]>(rotates ? row : 0);
      const auto codes = std::make_unique_for_overwrite<int8_t[]>(row);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = data<int64_t>(slots)[i], position = data<int64_t>(positions)[i];
        const T* key = data<T>(k) + i * row;
        const T* value = data<T>(v) + i * row;
        if (rotates) {
          const int64_t at = position * (dim / 2);
          cpu::rope_heads(key, cache.heads, dim, data<float>(cos) + at, data<float>(sin) + at,
                          rotated.get());
          key = rotated.get();
        }
        if (cache.quantized) {
          write_token(cache, key, slot, position, k_codes, k_scale, codes.get());
          write_token(cache, value, slot, position, v_codes, v_scale, codes.get());
        } else {
          write_float_token(cache, key, slot, position, k_codes);
          write_float_token(cache, value, slot, position, v_codes);
        }
      }
    });
  });
}

// Neighbouring queries of one slot and some query heads of one KV head: one call of attend().
struct Tile {
  int64_t first_query, queries, first_head, heads;
};

std::vector<Tile> make_tiles(const int64_t* slots, int64_t n, int64_t group) {
  const int64_t heads = std::min(group, cpu::kAttentionRows);
  const int64_t most = cpu::kAttentionRows / heads;
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < n;) {
    int64_t count = 1;
    while (count < most && i + count < n && slots[i + count] == slots[i]) ++count;
    for (int64_t h = 0; h < group; h += heads)
      tiles.push_back({i, count, h, std::min(heads, group - h)});
    i += count;
  }
  return tiles;
}

template <class T, class C>
void run_attention(const Cache& cache, const Tensor& q, const Tensor& k_codes,
                   const Tensor& k_scale, const Tensor& v_codes, const Tensor& v_scale,
                   const float* cos, const float* sin, const int64_t* slots, const int64_t* lengths,
                   float scaling, const Tensor& out) {
  const int64_t n = q.size(0), heads = q.size(1), d = cache.head_dim, group = heads / cache.heads;
  const std::vector<Tile> tiles = make_tiles(slots, n, group);
  const int64_t longest = n == 0 ? 0 : *std::max_element(lengths, lengths + n);
  const int64_t tasks = static_cast<int64_t>(tiles.size()) * cache.heads;
  // A token costs about as much as moving 16 bytes for each of its head_dim values.
  parallel_rows(tasks, longest * d * 16, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(cpu::attention_scratch(d));
    int64_t offsets[cpu::kAttentionRows], own[cpu::kAttentionRows];
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
      const int64_t scale_row = (cache.per_token ? slot : head) * cache.tokens;
      const cpu::CachedHead<C> cached{data<C>(k_codes) + head * cache.tokens * cache.row,
                                      data<C>(v_codes) + head * cache.tokens * cache.row,
                                      cache.quantized ? data<float>(k_scale) + scale_row : nullptr,
                                      cache.quantized ? data<float>(v_scale) + scale_row : nullptr,
                                      cos,
                                      sin,
                                      d,
                                      cache.row};
      cpu::attend(cached, data<T>(q), offsets, own, rows, scaling, mutable_data<T>(out),
                  scratch.get());
    }
  });
}

Tensor attention_decode(const Tensor& q_, const Tensor& k_codes, const Tensor& k_scale,
                        const Tensor& v_codes, const Tensor& v_scale, const Tensor& cos_,
                        const Tensor& sin_, const Tensor& slots_, const Tensor& lengths_,
                        double scaling, int64_t bits, bool pre_rope) {
  check_cpu(q_, "q");
  check_dim(q_, 3, "q");
  const int64_t n = q_.size(0), d = q_.size(2);
  const Cache cache = check_cache(k_codes, k_scale, v_codes, v_scale, d, bits, pre_rope);
  STD_TORCH_CHECK(cache.heads > 0 && q_.size(1) % cache.heads == 0, "q: ", q_.size(1),
                  " heads are not a multiple of the cache's ", cache.heads);
  const Tensor slots = check_indices(slots_, n, cache.slots, false, "slots");
  const Tensor lengths = check_indices(lengths_, n, cache.tokens, true, "lengths");
  const int64_t* length = data<int64_t>(lengths);
  const bool rotates = cache.quantized && pre_rope;
  const int64_t table_rows = rotates && n > 0 ? *std::max_element(length, length + n) : 0;
  const Tensor cos = check_table(cos_, table_rows, d / 2, "cos");
  const Tensor sin = check_table(sin_, table_rows, d / 2, "sin");
  const Tensor q = as_contiguous(q_);
  Tensor out = new_empty(q, sizes_of(q), q.scalar_type());
  if (q.numel() == 0) return out;
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto cache_tag) {
      run_attention<T, decltype(cache_tag)>(
          cache, q, k_codes, k_scale, v_codes, v_scale, rotates ? data<float>(cos) : nullptr,
          rotates ? data<float>(sin) : nullptr, data<int64_t>(slots), length,
          static_cast<float>(scaling), out);
    };
    switch (k_codes.scalar_type()) {
      case ScalarType::Char: return run(int8_t{});
      case ScalarType::Byte: return run(uint8_t{});
      default: return dispatch_float(k_codes.scalar_type(), "k_codes", run);
    }
  });
  return out;
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor");
  m.def(
      "rope_quantize_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, "
      "Tensor(b!) k_scale,"
      " Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor slots, Tensor positions, int bits, bool "
      "pre_rope) -> ()");
  m.def(
      "attention_decode(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, "
      "Tensor cos,"
      " Tensor sin, Tensor slots, Tensor lengths, float scaling, int bits, bool pre_rope) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("rope", TORCH_BOX(&llmqat::bindings::rope));
  m.impl("rope_quantize_append", TORCH_BOX(&llmqat::bindings::rope_quantize_append));
  m.impl("attention_decode", TORCH_BOX(&llmqat::bindings::attention_decode));
}
