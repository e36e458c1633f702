// The KV cache operators on CUDA tensors. Slots, positions, lengths and page tables stay on the
// device: the kernels check their values, so that a step can be captured in a CUDA graph.
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/kv_cache.h"
#include "cuda_stream.h"
#include "llmqat/heuristics_attention.h"

namespace llmqat::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_on(const Tensor& t, int32_t device, const char* name) {
  check_cuda(t, name);
  STD_TORCH_CHECK(t.get_device_index() == device, name, ": expected a tensor on device ", device,
                  ", got device ", t.get_device_index());
}

void check_group(int64_t heads, int64_t kv_heads) {
  STD_TORCH_CHECK(heads % kv_heads == 0, "q: ", heads, " heads are not a multiple of the cache's ",
                  kv_heads);
}

int storage_of(const Tensor& codes, int64_t bits) {
  const ScalarType dtype = codes.scalar_type();
  if (bits == 16 || bits == 32) {
    check_float_dtype(dtype, "k_codes");
    return dtype == ScalarType::Float      ? LLMQAT_KV_FLOAT32
           : dtype == ScalarType::BFloat16 ? LLMQAT_KV_BFLOAT16
                                           : LLMQAT_KV_FLOAT16;
  }
  check_bits(bits, "bits");
  if (dtype == ScalarType::Byte) {
    STD_TORCH_CHECK(bits <= 4, "k_codes: packed uint8 holds at most 4 bits, got bits=", bits);
    return LLMQAT_KV_INT4;
  }
  check_dtype(codes, ScalarType::Char, "k_codes");
  return LLMQAT_KV_INT8;
}

// The cache after its checks; the tensors own the memory. x is k or q, [n, heads, D].
LlmqatKvCache checked_cache(const Tensor& x, const Tensor& k_codes, const Tensor& k_scale,
                            const Tensor& v_codes, const Tensor& v_scale,
                            const std::optional<Tensor>& page_table, int64_t bits, bool pre_rope) {
  const int32_t device = x.get_device_index();
  const int64_t dim = x.size(2);
  STD_TORCH_CHECK(dim > 0 && dim % 2 == 0, "head_dim: expected an even size, got ", dim);
  check_dim(k_codes, 4, "k_codes");
  const int storage = storage_of(k_codes, bits);
  const bool quantized = storage == LLMQAT_KV_INT8 || storage == LLMQAT_KV_INT4;
  const int64_t row = storage == LLMQAT_KV_INT4 ? dim / 2 : dim;
  LlmqatKvCache cache{.k = k_codes.mutable_data_ptr(),
                      .v = v_codes.mutable_data_ptr(),
                      .k_scale = quantized ? mutable_data<float>(k_scale) : nullptr,
                      .v_scale = quantized ? mutable_data<float>(v_scale) : nullptr,
                      .page_table = nullptr,
                      .slots = k_codes.size(0),
                      .pages = 0,
                      .blocks = k_codes.size(0),
                      .heads = k_codes.size(1),
                      .block_tokens = k_codes.size(2),
                      .head_dim = dim,
                      .storage = storage,
                      .bits = static_cast<int>(bits),
                      .pre_rope = pre_rope && quantized};
  STD_TORCH_CHECK(cache.heads > 0, "k_codes: expected at least one KV head");
  for (const auto& [codes, name] :
       {std::pair{&k_codes, "k_codes"}, std::pair{&v_codes, "v_codes"}}) {
    check_on(*codes, device, name);
    check_dtype(*codes, k_codes.scalar_type(), name);
    check_shape(*codes, {cache.blocks, cache.heads, cache.block_tokens, row}, name);
    check_contiguous(*codes, name);
    check_aligned(*codes, name);
  }
  for (const auto& [scale, name] :
       {std::pair{&k_scale, "k_scale"}, std::pair{&v_scale, "v_scale"}}) {
    check_on(*scale, device, name);
    if (!quantized) continue;
    check_dtype(*scale, ScalarType::Float, name);
    check_contiguous(*scale, name);
    if (cache.pre_rope) {
      check_shape(*scale, {cache.blocks, cache.block_tokens}, name);
    } else {
      check_shape(*scale, {cache.blocks, cache.heads, cache.block_tokens}, name);
    }
  }
  if (page_table.has_value()) {
    check_on(*page_table, device, "page_table");
    check_dtype(*page_table, ScalarType::Int, "page_table");
    check_dim(*page_table, 2, "page_table");
    check_contiguous(*page_table, "page_table");
    STD_TORCH_CHECK(cache.blocks > 0, "k_codes: expected at least one page");
    STD_TORCH_CHECK(cache.block_tokens == kPageTokens, "k_codes: expected pages of ", kPageTokens,
                    " tokens, got ", cache.block_tokens);
    cache.page_table = data<int32_t>(*page_table);
    cache.slots = page_table->size(0);
    cache.pages = page_table->size(1);
  }
  return cache;
}

// x [n, heads, D] as a kernel reads it: a view whose last dimension is dense stays as it is.
struct Heads {
  // Rows at multiples of `multiple` values.
  explicit Heads(const Tensor& x, int64_t multiple = 1)
      : tensor(x.stride(2) == 1 && x.stride(0) % multiple == 0 && x.stride(1) % multiple == 0
                   ? x
                   : as_contiguous(x)) {}

  // A dimension of one has no stride to speak of: 0 breaks no alignment.
  LlmqatHeads view() const {
    return {tensor.const_data_ptr(), tensor.size(0) > 1 ? tensor.stride(0) : 0,
            tensor.size(1) > 1 ? tensor.stride(1) : tensor.size(2)};
  }

  Tensor tensor;
};

Tensor checked_indices(const Tensor& index, const Tensor& x, const char* name) {
  check_on(index, x.get_device_index(), name);
  check_dtype(index, ScalarType::Long, name);
  check_shape(index, {x.size(0)}, name);
  return as_contiguous(index);
}

Tensor checked_table(const Tensor& table, const Tensor& x, const char* name) {
  check_on(table, x.get_device_index(), name);
  check_dtype(table, ScalarType::Float, name);
  check_shape(table, {-1, x.size(2) / 2}, name);
  return as_contiguous(table);
}

// Queries that an append rotates on the way; none by default.
struct Queries {
  LlmqatHeads rows{};
  void* out = nullptr;
  int64_t heads = 0;
};

void append(const Queries& queries, const Tensor& k_, const Tensor& v_, const Tensor& cos_,
            const Tensor& sin_, const Tensor& k_codes, const Tensor& k_scale, const Tensor& v_codes,
            const Tensor& v_scale, const std::optional<Tensor>& page_table, const Tensor& slots_,
            const Tensor& positions_, int64_t bits, bool pre_rope) {
  check_cuda(k_, "k");
  check_dim(k_, 3, "k");
  const int dtype = cuda_dtype(k_.scalar_type(), "k");
  const LlmqatKvCache cache =
      checked_cache(k_, k_codes, k_scale, v_codes, v_scale, page_table, bits, pre_rope);
  check_group(queries.heads, cache.heads);
  const int64_t n = k_.size(0);
  const int32_t device = k_.get_device_index();
  check_shape(k_, {n, cache.heads, cache.head_dim}, "k");
  check_on(v_, device, "v");
  check_shape(v_, {n, cache.heads, cache.head_dim}, "v");
  check_dtype(v_, k_.scalar_type(), "v");
  const DeviceGuard guard(device);
  const Tensor slots = checked_indices(slots_, k_, "slots");
  const Tensor positions = checked_indices(positions_, k_, "positions");
  const Tensor cos = checked_table(cos_, k_, "cos"), sin = checked_table(sin_, k_, "sin");
  const LlmqatRopeTables tables{data<float>(cos), data<float>(sin),
                                std::min(cos.size(0), sin.size(0))};
  const Heads k(k_), v(v_);
  const LlmqatAppend problem{.k = k.view(),
                             .v = v.view(),
                             .q = queries.rows,
                             .q_out = queries.out,
                             .slots = data<int64_t>(slots),
                             .positions = data<int64_t>(positions),
                             .n = n,
                             .q_heads = queries.heads,
                             .dtype = dtype};
  check_launch(
      llmqat_cuda_rope_quantize_append(&cache, &problem, &tables, current_cuda_stream(device)),
      "rope_quantize_append");
}

void cuda_append(const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale,
                 const Tensor& slots, const Tensor& positions, int64_t bits, bool pre_rope) {
  append({}, k, v, cos, sin, k_codes, k_scale, v_codes, v_scale, std::nullopt, slots, positions,
         bits, pre_rope);
}

void cuda_append_paged(const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                       Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale,
                       const Tensor& page_table, const Tensor& slots, const Tensor& positions,
                       int64_t bits, bool pre_rope) {
  append({}, k, v, cos, sin, k_codes, k_scale, v_codes, v_scale, page_table, slots, positions, bits,
         pre_rope);
}

Tensor cuda_append_queries(const Tensor& q_, const Tensor& k, const Tensor& v, const Tensor& cos,
                           const Tensor& sin, Tensor k_codes, Tensor k_scale, Tensor v_codes,
                           Tensor v_scale, const std::optional<Tensor>& page_table,
                           const Tensor& slots, const Tensor& positions, int64_t bits,
                           bool pre_rope) {
  check_cuda(k, "k");
  check_dim(k, 3, "k");
  check_on(q_, k.get_device_index(), "q");
  check_shape(q_, {k.size(0), -1, k.size(2)}, "q");
  check_dtype(q_, k.scalar_type(), "q");
  const DeviceGuard guard(k.get_device_index());
  const Heads q(q_);
  Tensor out = new_empty(q_, sizes_of(q_), q_.scalar_type());
  append({q.view(), out.mutable_data_ptr(), q_.size(1)}, k, v, cos, sin, k_codes, k_scale, v_codes,
         v_scale, page_table, slots, positions, bits, pre_rope);
  return out;
}

// a_bits = 0: no codes.
std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& q_, const Tensor& k_codes, const Tensor& k_scale, const Tensor& v_codes,
    const Tensor& v_scale, const std::optional<Tensor>& page_table, const Tensor& cos_,
    const Tensor& sin_, const Tensor& slots_, const Tensor& lengths_, int64_t max_length,
    double scaling, int64_t bits, bool pre_rope, int64_t a_bits) {
  check_cuda(q_, "q");
  check_dim(q_, 3, "q");
  const int dtype = cuda_dtype(q_.scalar_type(), "q");
  const LlmqatKvCache cache =
      checked_cache(q_, k_codes, k_scale, v_codes, v_scale, page_table, bits, pre_rope);
  const int64_t n = q_.size(0), heads = q_.size(1), dim = q_.size(2);
  check_group(heads, cache.heads);
  const int64_t held = page_table.has_value() ? cache.pages * kPageTokens : cache.block_tokens;
  STD_TORCH_CHECK(max_length >= 0 && max_length <= held, "max_length: expected 0 to ", held,
                  ", got ", max_length);
  const int32_t device = q_.get_device_index();
  const DeviceGuard guard(device);
  const Tensor slots = checked_indices(slots_, q_, "slots");
  const Tensor lengths = checked_indices(lengths_, q_, "lengths");
  const Tensor cos = checked_table(cos_, q_, "cos"), sin = checked_table(sin_, q_, "sin");
  const LlmqatRopeTables tables{data<float>(cos), data<float>(sin),
                                std::min(cos.size(0), sin.size(0))};
  const Heads q(q_, 8);  // 16 bytes of fp16 and bf16, which the kernel on tensor cores loads
  const bool wanted = a_bits != 0;
  Tensor out = new_empty(q_, sizes_of(q_), q_.scalar_type());
  Tensor codes = new_empty(q_, {wanted ? n : 0, heads * dim}, ScalarType::Char);
  Tensor scale = new_empty(q_, {wanted ? n : 0}, ScalarType::Float);
  Tensor tickets = new_empty(q_, {wanted ? n : 0}, ScalarType::Int);
  int64_t sms = 0;
  check_launch(llmqat_cuda_multiprocessors(&sms), "attention_decode");
  LlmqatAttention problem{.q = q.view(),
                          .slots = data<int64_t>(slots),
                          .lengths = data<int64_t>(lengths),
                          .out = out.mutable_data_ptr(),
                          .codes = wanted ? mutable_data<int8_t>(codes) : nullptr,
                          .codes_scale = wanted ? mutable_data<float>(scale) : nullptr,
                          .workspace = nullptr,
                          .tickets = static_cast<uint32_t*>(tickets.mutable_data_ptr()),
                          .n = n,
                          .heads = heads,
                          .max_length = max_length,
                          .sms = sms,
                          .scaling = static_cast<float>(scaling),
                          .dtype = dtype,
                          .quantize_bits = static_cast<int>(a_bits),
                          .plan = LLMQAT_ATTENTION_AUTO};
  const int64_t bytes = llmqat_cuda_attention_workspace(&cache, &problem, &tables);
  Tensor workspace = new_empty(q_, {bytes / 4}, ScalarType::Float);
  problem.workspace = mutable_data<float>(workspace);
  check_launch(llmqat_cuda_attention_decode(&cache, &problem, &tables, current_cuda_stream(device)),
               "attention_decode");
  return {out, codes, scale};
}

Tensor cuda_attention(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                      const Tensor& v_codes, const Tensor& v_scale, const Tensor& cos,
                      const Tensor& sin, const Tensor& slots, const Tensor& lengths, double scaling,
                      int64_t bits, bool pre_rope) {
  check_dim(k_codes, 4, "k_codes");
  return std::get<0>(attend(q, k_codes, k_scale, v_codes, v_scale, std::nullopt, cos, sin, slots,
                            lengths, k_codes.size(2), scaling, bits, pre_rope, 0));
}

Tensor cuda_attention_paged(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                            const Tensor& v_codes, const Tensor& v_scale, const Tensor& page_table,
                            const Tensor& cos, const Tensor& sin, const Tensor& slots,
                            const Tensor& lengths, int64_t max_length, double scaling, int64_t bits,
                            bool pre_rope) {
  return std::get<0>(attend(q, k_codes, k_scale, v_codes, v_scale, page_table, cos, sin, slots,
                            lengths, max_length, scaling, bits, pre_rope, 0));
}

std::tuple<Tensor, Tensor, Tensor> cuda_attention_quantize(
    const Tensor& q, const Tensor& k_codes, const Tensor& k_scale, const Tensor& v_codes,
    const Tensor& v_scale, const std::optional<Tensor>& page_table, const Tensor& cos,
    const Tensor& sin, const Tensor& slots, const Tensor& lengths, int64_t max_length,
    double scaling, int64_t bits, bool pre_rope, int64_t a_bits) {
  check_bits(a_bits, "a_bits");
  return attend(q, k_codes, k_scale, v_codes, v_scale, page_table, cos, sin, slots, lengths,
                max_length, scaling, bits, pre_rope, a_bits);
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cuda, m) {
  m.def(
      "rope_quantize_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, "
      "Tensor(b!) k_scale, Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor slots, Tensor positions, "
      "int bits, bool pre_rope) -> ()");
  m.def(
      "rope_quantize_append_paged(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, "
      "Tensor(b!) k_scale, Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor page_table, Tensor "
      "slots, "
      "Tensor positions, int bits, bool pre_rope) -> ()");
  m.def(
      "rope_quantize_append_queries(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_codes, Tensor(b!) k_scale, Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor? "
      "page_table, Tensor slots, Tensor positions, int bits, bool pre_rope) -> Tensor");
  m.def(
      "attention_decode(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, "
      "Tensor cos, Tensor sin, Tensor slots, Tensor lengths, float scaling, int bits, bool "
      "pre_rope) -> Tensor");
  m.def(
      "attention_decode_paged(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor "
      "v_scale, Tensor page_table, Tensor cos, Tensor sin, Tensor slots, Tensor lengths, int "
      "max_length, float scaling, int bits, bool pre_rope) -> Tensor");
  m.def(
      "attention_decode_quantize(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor "
      "v_scale, Tensor? page_table, Tensor cos, Tensor sin, Tensor slots, Tensor lengths, int "
      "max_length, float scaling, int bits, bool pre_rope, int a_bits) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cuda, CUDA, m) {
  m.impl("rope_quantize_append", TORCH_BOX(&llmqat::bindings::cuda_append));
  m.impl("rope_quantize_append_paged", TORCH_BOX(&llmqat::bindings::cuda_append_paged));
  m.impl("rope_quantize_append_queries", TORCH_BOX(&llmqat::bindings::cuda_append_queries));
  m.impl("attention_decode", TORCH_BOX(&llmqat::bindings::cuda_attention));
  m.impl("attention_decode_paged", TORCH_BOX(&llmqat::bindings::cuda_attention_paged));
  m.impl("attention_decode_quantize", TORCH_BOX(&llmqat::bindings::cuda_attention_quantize));
}
