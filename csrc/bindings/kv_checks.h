// Checks of the arguments that name a KV cache, its rows and the RoPE tables.
#pragma once

#include <utility>

#include "checks.h"
#include "cpu/kv_cache.h"

namespace llmqat::bindings {

inline void check_cache_scale(const Tensor& scale, const cpu::KvCache& cache, const char* name) {
  check_cpu(scale, name);
  if (!cache.quantized()) return;
  check_dtype(scale, ScalarType::Float, name);
  check_contiguous(scale, name);
  if (cache.pre_rope) {
    check_shape(scale, {cache.slots, cache.tokens}, name);
  } else {
    check_shape(scale, {cache.slots, cache.heads, cache.tokens}, name);
  }
}

inline cpu::CacheType cache_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char: return cpu::CacheType::int8;
    case ScalarType::Byte: return cpu::CacheType::int4;
    case ScalarType::BFloat16: return cpu::CacheType::bfloat16;
    case ScalarType::Half: return cpu::CacheType::float16;
    default: return cpu::CacheType::float32;
  }
}

// A cache [S, Hkv, T, D] after its checks (spec 9). The tensors own the memory.
inline cpu::KvCache check_cache(const Tensor& k_codes, const Tensor& k_scale, const Tensor& v_codes,
                                const Tensor& v_scale, int64_t head_dim, int64_t bits,
                                bool pre_rope) {
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
  const cpu::KvCache cache{.slots = k_codes.size(0),
                           .heads = k_codes.size(1),
                           .tokens = k_codes.size(2),
                           .head_dim = head_dim,
                           .row = packed ? head_dim / 2 : head_dim,
                           .bits = static_cast<int>(bits),
                           .type = cache_type(k_codes.scalar_type()),
                           .pre_rope = pre_rope,
                           .k = k_codes.mutable_data_ptr(),
                           .v = v_codes.mutable_data_ptr(),
                           .k_scale = quantized ? mutable_data<float>(k_scale) : nullptr,
                           .v_scale = quantized ? mutable_data<float>(v_scale) : nullptr};
  for (const auto& [codes, name] :
       {std::pair{&k_codes, "k_codes"}, std::pair{&v_codes, "v_codes"}}) {
    check_dtype(*codes, k_codes.scalar_type(), name);
    check_shape(*codes, {cache.slots, cache.heads, cache.tokens, cache.row}, name);
    check_contiguous(*codes, name);
  }
  check_cache_scale(k_scale, cache, "k_scale");
  check_cache_scale(v_scale, cache, "v_scale");
  return cache;
}

// int64 [n] with values in [0, limit), or [0, limit] where the limit itself is allowed.
inline Tensor check_indices(const Tensor& index_, int64_t n, int64_t limit, bool inclusive,
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

inline Tensor check_table(const Tensor& table, int64_t rows, int64_t half, const char* name) {
  check_cpu(table, name);
  check_dtype(table, ScalarType::Float, name);
  check_shape(table, {-1, half}, name);
  STD_TORCH_CHECK(table.size(0) >= rows, name, ": expected at least ", rows, " rows, got ",
                  table.size(0));
  return as_contiguous(table);
}

}  // namespace llmqat::bindings
