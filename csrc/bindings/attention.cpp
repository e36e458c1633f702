// RoPE, the write into the KV cache, and attention over it.
#include <algorithm>

#include "checks.h"
#include "cpu/kv_cache.h"
#include "kv_checks.h"

namespace llmqat::bindings {
namespace {

Tensor rope(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_) {
  check_cpu(x_, "x");
  check_dim(x_, 3, "x");
  const int64_t n = x_.size(0), heads = x_.size(1), dim = x_.size(2);
  STD_TORCH_CHECK(dim % 2 == 0, "x: expected an even head dimension, got ", dim);
  const Tensor cos = check_table(cos_, 0, dim / 2, "cos");
  const Tensor sin = check_table(sin_, cos.size(0), dim / 2, "sin");
  const Tensor positions = check_indices(positions_, n, cos.size(0), false, "positions");
  const Tensor x = as_contiguous(x_);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    cpu::rope_rows(torch_threads(), data<T>(x), heads * dim, n, heads, dim,
                   {data<float>(cos), data<float>(sin)}, data<int64_t>(positions),
                   mutable_data<T>(y));
  });
  return y;
}

void rope_quantize_append(const Tensor& k_, const Tensor& v_, const Tensor& cos_,
                          const Tensor& sin_, Tensor k_codes, Tensor k_scale, Tensor v_codes,
                          Tensor v_scale, const Tensor& slots_, const Tensor& positions_,
                          int64_t bits, bool pre_rope) {
  check_cpu(k_, "k");
  check_cpu(v_, "v");
  check_dim(k_, 3, "k");
  const int64_t n = k_.size(0), dim = k_.size(2);
  const cpu::KvCache cache = check_cache(k_codes, k_scale, v_codes, v_scale, dim, bits, pre_rope);
  check_shape(k_, {n, cache.heads, dim}, "k");
  check_shape(v_, {n, cache.heads, dim}, "v");
  check_dtype(v_, k_.scalar_type(), "v");
  const Tensor slots = check_indices(slots_, n, cache.slots, false, "slots");
  const Tensor positions = check_indices(positions_, n, cache.tokens, false, "positions");
  const int64_t* position = data<int64_t>(positions);
  const int64_t table_rows =
      cache.rotates_on_write() && n > 0 ? *std::max_element(position, position + n) + 1 : 0;
  const Tensor cos = check_table(cos_, table_rows, dim / 2, "cos");
  const Tensor sin = check_table(sin_, table_rows, dim / 2, "sin");
  const Tensor k = as_contiguous(k_), v = as_contiguous(v_);
  dispatch_float(k.scalar_type(), "k", [&](auto tag) {
    using T = decltype(tag);
    cpu::append_rows(torch_threads(), cache, data<T>(k), data<T>(v), cache.heads * dim, n,
                     {data<float>(cos), data<float>(sin)}, data<int64_t>(slots), position);
  });
}

Tensor attention_decode(const Tensor& q_, const Tensor& k_codes, const Tensor& k_scale,
                        const Tensor& v_codes, const Tensor& v_scale, const Tensor& cos_,
                        const Tensor& sin_, const Tensor& slots_, const Tensor& lengths_,
                        double scaling, int64_t bits, bool pre_rope) {
  check_cpu(q_, "q");
  check_dim(q_, 3, "q");
  const int64_t n = q_.size(0), heads = q_.size(1), d = q_.size(2);
  const cpu::KvCache cache = check_cache(k_codes, k_scale, v_codes, v_scale, d, bits, pre_rope);
  STD_TORCH_CHECK(cache.heads > 0 && heads % cache.heads == 0, "q: ", heads,
                  " heads are not a multiple of the cache's ", cache.heads);
  const Tensor slots = check_indices(slots_, n, cache.slots, false, "slots");
  const Tensor lengths = check_indices(lengths_, n, cache.tokens, true, "lengths");
  const int64_t* length = data<int64_t>(lengths);
  const int64_t table_rows =
      cache.rotates_on_read() && n > 0 ? *std::max_element(length, length + n) : 0;
  const Tensor cos = check_table(cos_, table_rows, d / 2, "cos");
  const Tensor sin = check_table(sin_, table_rows, d / 2, "sin");
  const Tensor q = as_contiguous(q_);
  Tensor out = empty_cpu(sizes_of(q), q.scalar_type());
  if (q.numel() == 0) return out;
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = decltype(tag);
    cpu::attend_rows(torch_threads(), cache, data<T>(q), n, heads,
                     {data<float>(cos), data<float>(sin)}, data<int64_t>(slots), length,
                     static_cast<float>(scaling), mutable_data<T>(out));
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
