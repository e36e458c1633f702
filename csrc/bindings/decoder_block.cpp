// Decoder blocks in one call: what the runtime engine runs for a step on the CPU, without a tensor
// or a dispatcher call for each of the eleven operators of a block.
//
// An inner operator: not in schemas.py. The public operators composed in Python give the same bits.
#include "cpu/decoder_block.h"

#include <algorithm>
#include <deque>

#include "checks.h"
#include "kv_checks.h"
#include "matmul_weights.h"

namespace llmqat::bindings {
namespace {

// In the order of the lists, for each block.
enum : size_t { kInputNorm, kPostNorm, kQkv, kO = kQkv + 2, kGateUp = kO + 2, kDown = kGateUp + 2 };
constexpr size_t kWeights = kDown + 2;
constexpr size_t kLinears = 4;
constexpr size_t kCacheTensors = 4;

// Norm weights and biases as fp32, the widened copies of 16-bit ones included.
class Vectors {
 public:
  const float* get(const Tensor& t, int64_t n, const char* name) {
    check_cpu(t, name);
    check_shape(t, {n}, name);
    check_contiguous(t, name);
    if (t.scalar_type() == ScalarType::Float) return data<float>(t);
    std::vector<float>& wide = copies_.emplace_back(static_cast<size_t>(n));
    dispatch_float(t.scalar_type(), name, [&](auto tag) {
      const auto* from = data<decltype(tag)>(t);
      for (int64_t i = 0; i < n; ++i) wide[static_cast<size_t>(i)] = to_float(from[i]);
    });
    return wide.data();
  }

 private:
  std::deque<std::vector<float>> copies_;
};

void check_count(size_t actual, size_t expected, const char* name) {
  STD_TORCH_CHECK(actual == expected, name, ": expected ", expected,
                  " entries for the blocks, got ", actual);
}

// weights[at] is the repacked weight, weights[at + 1] its scale [N] or [N, groups]; [N] if there
// are multipliers [N, groups].
cpu::IntLinear linear(const std::vector<Tensor>& weights, size_t at, int64_t n, int64_t k,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& multiplier,
                      Vectors& vectors) {
  const Tensor &w = weights[at], &scale = weights[at + 1];
  check_contiguous(w, "w");
  check_contiguous(scale, "w_scale");
  const Weight weight = repacked_codes(w, n, k);
  STD_TORCH_CHECK(k <= cpu::kMaxK, "w: K = ", k, " could overflow int32; at most ", cpu::kMaxK);
  const bool integer = multiplier.has_value(), grouped = integer || scale.dim() == 2;
  const int64_t groups = !grouped ? 1 : integer ? multiplier->size(1) : scale.size(1);
  STD_TORCH_CHECK(groups > 0 && k % groups == 0, "w_scale: ", groups,
                  " groups do not divide K = ", k);
  const int64_t group_size = grouped ? k / groups : -1;
  weight_scale(scale, weight.n, k, integer ? -1 : group_size);
  if (integer) {
    check_contiguous(*multiplier, "w_multiplier");
    check_shape(group_multiplier(*multiplier, group_size), {weight.n, groups}, "w_multiplier");
  }
  return {weight.bytes,
          weight.layout,
          weight.n,
          k,
          data<float>(scale),
          group_size,
          bias.has_value() ? vectors.get(*bias, weight.n, "bias") : nullptr,
          integer ? data<uint8_t>(*multiplier) : nullptr};
}

void decoder_blocks(Tensor hidden, const std::vector<Tensor>& weights,
                    const std::vector<std::optional<Tensor>>& biases,
                    const std::vector<std::optional<Tensor>>& multipliers,
                    const std::vector<Tensor>& caches, const std::vector<double>& eps,
                    const std::vector<int64_t>& bits, const Tensor& cos_, const Tensor& sin_,
                    const Tensor& slots_, const Tensor& positions_, int64_t heads, double scaling,
                    int64_t kv_bits, bool pre_rope) {
  check_cpu(hidden, "hidden");
  check_dim(hidden, 2, "hidden");
  check_contiguous(hidden, "hidden");
  const size_t count = bits.size();
  check_count(weights.size(), kWeights * count, "weights");
  check_count(biases.size(), kLinears * count, "biases");
  check_count(multipliers.size(), kLinears * count, "multipliers");
  check_count(caches.size(), kCacheTensors * count, "caches");
  check_count(eps.size(), 2 * count, "eps");
  if (count == 0) return;

  const int64_t n = hidden.size(0), columns = hidden.size(1), half = cos_.size(cos_.dim() - 1);
  const Tensor cos = check_table(cos_, 0, half, "cos");
  const Tensor sin = check_table(sin_, cos.size(0), half, "sin");
  STD_TORCH_CHECK(heads > 0, "heads: expected a positive number, got ", heads);
  Vectors vectors;
  std::vector<cpu::DecoderBlock> blocks(count);
  int64_t slot_limit = INT64_MAX, token_limit = cos.size(0);
  for (size_t i = 0; i < count; ++i) {
    cpu::DecoderBlock& b = blocks[i];
    const Tensor* c = &caches[i * kCacheTensors];
    const std::optional<Tensor>* bias = &biases[i * kLinears];
    const std::optional<Tensor>* multiplier = &multipliers[i * kLinears];
    const size_t at = i * kWeights;
    check_bits(bits[i], "bits");
    b.bits = static_cast<int>(bits[i]);
    b.cache = check_cache(c[0], c[1], c[2], c[3], 2 * half, kv_bits, pre_rope);
    STD_TORCH_CHECK(b.cache.heads > 0 && heads % b.cache.heads == 0, "heads: ", heads,
                    " is not a multiple of the cache's ", b.cache.heads);
    slot_limit = std::min(slot_limit, b.cache.slots);
    token_limit = std::min(token_limit, b.cache.tokens);
    b.input_norm = vectors.get(weights[at + kInputNorm], columns, "input_norm");
    b.post_norm = vectors.get(weights[at + kPostNorm], columns, "post_norm");
    b.input_eps = static_cast<float>(eps[2 * i]);
    b.post_eps = static_cast<float>(eps[2 * i + 1]);
    const int64_t width = heads * 2 * half, fused = width + 2 * b.cache.heads * 2 * half;
    b.qkv = linear(weights, at + kQkv, fused, columns, bias[0], multiplier[0], vectors);
    b.o = linear(weights, at + kO, columns, width, bias[1], multiplier[1], vectors);
    b.gate_up = linear(weights, at + kGateUp, -1, columns, bias[2], multiplier[2], vectors);
    STD_TORCH_CHECK(b.gate_up.n % 2 == 0, "weights: gate_up has an odd number of rows, ",
                    b.gate_up.n);
    b.down = linear(weights, at + kDown, columns, b.gate_up.n / 2, bias[3], multiplier[3], vectors);
  }
  const Tensor slots = check_indices(slots_, n, slot_limit, false, "slots");
  const Tensor positions = check_indices(positions_, n, token_limit, false, "positions");
  const cpu::DecoderRows rows{.n = n,
                              .hidden = columns,
                              .heads = heads,
                              .slots = data<int64_t>(slots),
                              .positions = data<int64_t>(positions),
                              .tables = {data<float>(cos), data<float>(sin)},
                              .scaling = static_cast<float>(scaling)};
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    cpu::run_decoder_blocks(torch_threads(), blocks.data(), static_cast<int64_t>(count), rows,
                            mutable_data<decltype(tag)>(hidden));
  });
}

}  // namespace
}  // namespace llmqat::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(llmqat_cpu, m) {
  // hidden [n, H], in place: the residual stream. For each block: weights input_norm, post_norm [H]
  // and (repacked weight, scale) of qkv, o, gate_up, down; biases of these four, and their
  // multipliers of integer groups; caches k_codes, k_scale, v_codes, v_scale; eps of the two norms;
  // bits of the activations.
  m.def(
      "decoder_blocks(Tensor(a!) hidden, Tensor[] weights, Tensor?[] biases, Tensor?[] "
      "multipliers, Tensor(b!)[] caches,"
      " float[] eps, int[] bits, Tensor cos, Tensor sin, Tensor slots, Tensor positions, int heads,"
      " float scaling, int kv_bits, bool pre_rope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmqat_cpu, CPU, m) {
  m.impl("decoder_blocks", TORCH_BOX(&llmqat::bindings::decoder_blocks));
}
