// The C interface of the linears on packed weights (fragment_layout.h): no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/launchers.h"

extern "C" {

// y[m, n] = a[m, k] @ w[n, k].T, then scales, bias and one cast (spec 7); with silu_mul the first
// n / 2 channels are gates and y[m, n / 2] = silu(gate) * up (spec 14).
struct LlmqatLinear {
  const void* a;         // int8 [m, k], or fp16 / bf16 for activations that are not quantized
  const float* a_scale;  // [m]; not read for float a
  const uint8_t* w;      // layout_bytes(nibbles, n, k), 16-byte aligned
  const float* w_scale;  // [n]
  const void* bias;      // [n] of bias_dtype, or null
  const void* residual;  // [m, n] of dtype, added after the cast and rounded again, or null
  void* y;               // of dtype
  void* workspace;       // linear_workspace_bytes(sms), zero before and after each launch
  int64_t m, n, k;
  int64_t sms;  // multiprocessors of the device
  int dtype, bias_dtype;
  bool nibbles;   // 4-bit weights; float a needs them
  bool silu_mul;  // n is even and there is no residual
};

// The workspace of a stream of the current device, made by its first call and kept for good, and
// the multiprocessors of that device. May be called while the stream is being captured.
int llmqat_cuda_linear_workspace(void* stream, void** workspace, int64_t* sms);

// Waits for the stream and copies one value to the host.
int llmqat_cuda_read_int32(const int32_t* device, int32_t* host, void* stream);

// int8 activations: dtype is any; exact, so that no cut of the work changes a bit.
int llmqat_cuda_integer_linear(const LlmqatLinear* problem, void* stream);

// fp16 or bf16 activations (dtype is theirs): fp32 sums in an order that only n, k and sms fix.
int llmqat_cuda_float_linear(const LlmqatLinear* problem, void* stream);

// Row-major codes (int8 [n, k], or spec 8 bytes [n, ceil(k / 2)] when `packed`) to the layout,
// layout_bytes and the tag.
// *misfit becomes 1 if a code does not fit the 4 bits of `nibbles`.
int llmqat_cuda_repack_weight(const void* w, bool packed, int64_t n, int64_t k, bool nibbles,
                              uint8_t* out, int32_t* misfit, void* stream);

}  // extern "C"
