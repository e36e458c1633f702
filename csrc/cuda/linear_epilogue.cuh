// From accumulators to results: scales, bias, residual or SiLU * up, one cast. Shared by the
// integer and the float kernels.
//
// A thread of tile t, lane 4 * group + quarter, holds for each column tile j of 8 tokens and each
// half of the channels four values: channels c = 16 t + 2 group and c + 1 of tokens
// 8 j + 2 quarter and the next, as {c, token}, {c, token + 1}, {c + 1, token}, {c + 1, token + 1}.
#pragma once

#include "cuda/linear_pipeline.cuh"
#include "llmqat/fast_math.h"
#include "llmqat/vec.cuh"

namespace llmqat {

LLMQAT_DEVICE float load_float(const void* values, int dtype, int64_t i) {
  if (dtype == LLMQAT_FLOAT32) return static_cast<const float*>(values)[i];
  return dtype == LLMQAT_BFLOAT16 ? to_float(static_cast<const bf16*>(values)[i])
                                  : to_float(static_cast<const fp16*>(values)[i]);
}

// Spec 14 in dtype T.
template <class T>
LLMQAT_DEVICE T silu_mul(T gate, T up) {
  const float g = to_float(gate);
  const float silu = round_to<T>(div_rn(g, add_rn(1.0f, exp_f32(-g))));
  return from_float<T>(mul_rn(silu, to_float(up)));
}

// The channels of one thread: two of each half, with their scales and biases.
struct ThreadChannels {
  int64_t first[2];  // of each half; the other is the next one
  int count[2];      // channels there are: 0, 1 or 2
  float scale[2][2];
  float bias[2][2];

  LLMQAT_DEVICE ThreadChannels(const LinearArgs& args, int64_t tile, int lane) {
    const int64_t half = half_channels(args.p.n);
    const int64_t in_half = tile * kTileRows + lane / 4 * 2;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      first[part] = part * half + in_half;
      const int64_t left = (part == 0 ? half : args.p.n - half) - in_half;
      count[part] = left >= 2 ? 2 : left == 1 ? 1 : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool there = i < count[part];
        scale[part][i] = there ? args.p.w_scale[first[part] + i] : 0.0f;
        bias[part][i] = there && args.p.bias != nullptr
                            ? load_float(args.p.bias, args.p.bias_dtype, first[part] + i)
                            : 0.0f;
      }
    }
  }
};

// One or two neighbours of y; both in one store where every row allows it.
template <class T>
LLMQAT_DEVICE void store_pair(const LinearArgs& args, int64_t at, bool paired, int count, T v0,
                              T v1) {
  T* y = static_cast<T*>(args.p.y) + at;
  if (paired && count == 2) {
    store_vec(y, Vec<T, 2>{{v0, v1}});
  } else {
    if (count > 0) y[0] = v0;
    if (count > 1) y[1] = v1;
  }
}

// The results of one thread for one token. `scale` is the token's; with kTokenScale false there is
// none (float activations).
template <class T, bool kTokenScale>
LLMQAT_DEVICE void store_token(const LinearArgs& args, const ThreadChannels& channels,
                               int64_t token, const float (&acc)[2][2]) {
  const float sx = kTokenScale ? args.p.a_scale[token] : 1.0f;
  T value[2][2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sw = channels.scale[part][i];
      float v = mul_rn(acc[part][i], kTokenScale ? mul_rn(sx, sw) : sw);
      if (args.p.bias != nullptr) v = add_rn(v, channels.bias[part][i]);
      value[part][i] = from_float<T>(v);
    }
  }
  // Pairs are aligned if both halves and all rows start at an even element.
  const bool paired = args.p.n % 4 == 0;
  if (args.p.silu_mul) {
    store_pair(args, token * (args.p.n / 2) + channels.first[0], paired, channels.count[0],
               silu_mul(value[0][0], value[1][0]), silu_mul(value[0][1], value[1][1]));
    return;
  }
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t at = token * args.p.n + channels.first[part];
    if (args.p.residual != nullptr) {
      const T* residual = static_cast<const T*>(args.p.residual) + at;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i < channels.count[part]) {
          const float sum = add_rn(to_float(value[part][i]), to_float(residual[i]));
          value[part][i] = from_float<T>(sum);
        }
      }
    }
    store_pair(args, at, paired, channels.count[part], value[part][0], value[part][1]);
  }
}

template <class T, bool kTokenScale, class Value, int kTokenTiles>
LLMQAT_DEVICE void store_tile_as(const LinearArgs& args, int64_t tile, int lane,
                                 Value (&acc)[2][kTokenTiles][4]) {
  const ThreadChannels channels(args, tile, lane);
  // Not unrolled (the code is long): the values of the next column tile move to the first instead.
#pragma unroll 1
  for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t token = j * 8 + lane % 4 * 2 + odd;
      if (token >= args.p.m) continue;
      const float values[2][2] = {
          {static_cast<float>(acc[0][0][odd]), static_cast<float>(acc[0][0][2 + odd])},
          {static_cast<float>(acc[1][0][odd]), static_cast<float>(acc[1][0][2 + odd])}};
      store_token<T, kTokenScale>(args, channels, token, values);
    }
#pragma unroll
    for (int next = 1; next < kTokenTiles; ++next) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[0][next - 1][i] = acc[0][next][i];
        acc[1][next - 1][i] = acc[1][next][i];
      }
    }
  }
}

// Writes y for one tile; acc is used up. All lanes of a warp call it with their own values.
template <bool kTokenScale, class Value, int kTokenTiles>
LLMQAT_DEVICE void store_tile(const LinearArgs& args, int64_t tile, int lane,
                              Value (&acc)[2][kTokenTiles][4]) {
  if (args.p.dtype == LLMQAT_FLOAT32) {
    store_tile_as<float, kTokenScale>(args, tile, lane, acc);
  } else if (args.p.dtype == LLMQAT_BFLOAT16) {
    store_tile_as<bf16, kTokenScale>(args, tile, lane, acc);
  } else {
    store_tile_as<fp16, kTokenScale>(args, tile, lane, acc);
  }
}

}  // namespace llmqat
