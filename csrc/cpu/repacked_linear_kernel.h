// Tiles on codes, written once; repacked_linear.cpp compiles them per instruction set. No include
// guard on purpose.

#define LLMQAT_INLINE LLMQAT_SIMD __attribute__((always_inline)) inline

constexpr int kBlocks = kPanelChannels / kLanes;  // registers of a panel
using Blocks = std::make_integer_sequence<int, kBlocks>;

// Tiles: at most 16 sums of 32 registers (AVX-512) or 12 of 16 (AVX2), so that the scales (AVX2:
// from L1) and one k of the activations fit beside them.
constexpr int kMaxCodeRows = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 1;
constexpr int most_panels(int rows) {
  if (kLanes == 16) return rows == 1 ? 4 : rows <= 4 ? 2 : 1;
  return kLanes == 8 && rows == 1 ? 2 : 1;
}
inline int tile_panels(int rows) { return most_panels(rows); }

// Block B of panel p in k J of its quad.
template <int J, int B, int R, int P, class D, class C>
LLMQAT_INLINE void add_block(F (&acc)[R][P][kBlocks], int p, const F (&x)[R], const C& quad,
                             const F (&scale)[kBlocks]) {
  const F w = rounded<D>(mul(quad.template value<J, B>(), scale[B]));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][p][B] = fused_add(x[r], w, acc[r][p][B]);
}

// k J of a quad of P panels.
template <int J, int R, int P, class D, class C, int... B>
LLMQAT_INLINE void add_k(F (&acc)[R][P][kBlocks], const float* at, int64_t ldx, const C (&quad)[P],
                         const F (&scale)[P][kBlocks], std::integer_sequence<int, B...>) {
  F x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) x[r] = set(at[r * ldx]);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) (add_block<J, B, R, P, D>(acc, p, x, quad[p], scale[p]), ...);
}

// The k of [k, stop), all of one group; returns stop.
template <int R, int P, class D, class C>
LLMQAT_INLINE int64_t add_group(F (&acc)[R][P][kBlocks], const CodeTileArgs& t, int64_t k,
                                int64_t stop) {
  const CodePanels& w = t.w;
  const float* scales = w.scale + k / w.group_size * w.ld;
  F scale[P][kBlocks];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b)
      scale[p][b] = load_first(scales + p * kPanelChannels + b * kLanes, kLanes);
  C quad[P];
  while (k < stop) {
    const uint8_t* at = w.first + k / kQuad * C::kBytes;
    if (k % kQuad == 0) {
      const float* x = t.x + k;
      for (; k + kQuad <= stop; k += kQuad, at += C::kBytes, x += kQuad) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) quad[p].load(at + p * w.stride);
        add_k<0, R, P, D>(acc, x, t.ldx, quad, scale, Blocks{});
        add_k<1, R, P, D>(acc, x + 1, t.ldx, quad, scale, Blocks{});
        add_k<2, R, P, D>(acc, x + 2, t.ldx, quad, scale, Blocks{});
        add_k<3, R, P, D>(acc, x + 3, t.ldx, quad, scale, Blocks{});
      }
      if (k == stop) break;
    }
    // A quad of a tail, or of two groups.
    for (int p = 0; p < P; ++p) {
      quad[p].load(at + p * w.stride);
      for (int64_t skipped = k % kQuad; skipped > 0; --skipped) quad[p].skip_one();
    }
    do {
      add_k<0, R, P, D>(acc, t.x + k, t.ldx, quad, scale, Blocks{});
      for (int p = 0; p < P; ++p) quad[p].skip_one();
      ++k;
    } while (k < stop && k % kQuad != 0);
  }
  return k;
}

template <int R, int P, class C, class D>
LLMQAT_SIMD void tile(const CodeTileArgs& t) {
  for (int64_t begin = 0; begin == 0 || begin < t.k; begin += kSumK) {
    F acc[R][P][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) acc[r][p][b] = set(0.0f);

    const int64_t end = begin + block_length(t.k, begin);
    for (int64_t k = begin; k < end;) k = add_group<R, P, D, C>(acc, t, k, group_end(t.w, k, end));

    float* out = t.out;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b, out += kLanes) {
          const F sum = acc[r][p][b];
          store_first(out, kLanes, begin > 0 ? add(load_first(out, kLanes), sum) : sum);
        }
  }
}

template <class D, class C, int... B>
LLMQAT_INLINE void store_k(const C& quad, const F (&scale)[kBlocks], float* low, float* high,
                           std::integer_sequence<int, B...>) {
  constexpr int kHalf = kBlocks / 2;
  const F w[kBlocks] = {rounded<D>(mul(quad.template value<0, B>(), scale[B]))...};
#pragma GCC unroll 2
  for (int b = 0; b < kHalf; ++b) store_first(low + b * kLanes, kLanes, w[b]);
  if (high == nullptr) return;
#pragma GCC unroll 2
  for (int b = 0; b < kHalf; ++b) store_first(high + b * kLanes, kLanes, w[kHalf + b]);
}

template <class C, class D>
LLMQAT_SIMD void unpack(const CodePanels& w, int64_t begin, int64_t end, float* low, float* high) {
  for (int64_t k = begin; k < end;) {
    const int64_t stop = group_end(w, k, end);
    const float* scales = w.scale + k / w.group_size * w.ld;
    F scale[kBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) scale[b] = load_first(scales + b * kLanes, kLanes);
    while (k < stop) {
      C quad;
      quad.load(w.first + k / kQuad * C::kBytes);
      for (int64_t skipped = k % kQuad; skipped > 0; --skipped) quad.skip_one();
      do {
        store_k<D>(quad, scale, low, high, Blocks{});
        quad.skip_one();
        low += kFloatPanel;
        if (high != nullptr) high += kFloatPanel;
        ++k;
      } while (k < stop && k % kQuad != 0);
    }
  }
}

using Tile = void (*)(const CodeTileArgs&);

template <int R, class C, class D>
Tile tile_of(int panels) {
  if constexpr (most_panels(R) >= 4)
    if (panels == 4) return tile<R, 4, C, D>;
  if constexpr (most_panels(R) >= 2)
    if (panels == 2) return tile<R, 2, C, D>;
  return tile<R, 1, C, D>;
}

template <class C, class D, int... R>
void run_rows(int rows, int panels, const CodeTileArgs& args, std::integer_sequence<int, R...>) {
  constexpr Tile (*kOfRows[])(int) = {tile_of<R + 1, C, D>...};
  kOfRows[rows - 1](panels)(args);
}

template <class C, class D>
void run_tile(int rows, int panels, const CodeTileArgs& args) {
  run_rows<C, D>(rows, panels, args, std::make_integer_sequence<int, kMaxCodeRows>{});
}

template <class D>
void run_tile_as(int rows, int panels, const CodeTileArgs& args) {
  args.w.nibbles ? run_tile<Nibbles, D>(rows, panels, args)
                 : run_tile<Bytes, D>(rows, panels, args);
}

inline void code_tile(int rows, int panels, const CodeTileArgs& args) {
  switch (args.w.round) {
    case RoundTo::bfloat16: return run_tile_as<bf16>(rows, panels, args);
    case RoundTo::float16: return run_tile_as<fp16>(rows, panels, args);
    default: return run_tile_as<float>(rows, panels, args);
  }
}

template <class D>
void unpack_as(const CodePanels& w, int64_t begin, int64_t end, float* low, float* high) {
  w.nibbles ? unpack<Nibbles, D>(w, begin, end, low, high)
            : unpack<Bytes, D>(w, begin, end, low, high);
}

inline void code_unpack(const CodePanels& w, int64_t begin, int64_t end, float* low, float* high) {
  switch (w.round) {
    case RoundTo::bfloat16: return unpack_as<bf16>(w, begin, end, low, high);
    case RoundTo::float16: return unpack_as<fp16>(w, begin, end, low, high);
    default: return unpack_as<float>(w, begin, end, low, high);
  }
}

#undef LLMQAT_INLINE

inline constexpr CodeKernels kCodeKernels = {kMaxCodeRows, tile_panels, code_tile, code_unpack};
