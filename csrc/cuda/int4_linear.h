// The C interface of the product with integer group scales: no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/launchers.h"

extern "C" {

// y[m, n]: spec 18. Row-major and contiguous, on the current device.
struct LlmqatInt4Linear {
  const void* a;                // int8 [m, k], or packed codes (spec 8) [m, ceil(k / 2)]
  const float* a_scale;         // [m]
  const void* w;                // int8 [n, k], or packed codes [n, ceil(k / 2)]
  const uint8_t* multiplier;    // [n, k / group_size]
  const float* w_scale;         // [n]
  const void* bias;             // [n] of bias_dtype, or null
  void* y;                      // [m, n] of dtype
  int32_t* workspace;           // int4_workspace_bytes of the plan (heuristics_int4.h)
  uint32_t* tickets;            // [tiles] zeros if the plan splits k
  int64_t m, n, k, group_size;  // k <= 38,342
  int dtype, bias_dtype;
  bool a_packed, w_packed;
  int token_tile, splits;  // of the plan
};

// Whether the tiled kernel can read these operands.
bool llmqat_cuda_int4_is_regular(const LlmqatInt4Linear* problem);

int llmqat_cuda_int4_linear(const LlmqatInt4Linear* problem, void* stream);

}  // extern "C"
