// What a block of attention_mma.cu prepares and what its warps load: scales, tables and queries in
// shared memory, tiles of codes in registers.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/attention_codes.cuh"

namespace llmqat {

inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr float kLn2 = 0.69314718055994531f, kLog2E = 1.4426950408889634f;

// How one token weighs: score * k + exponent, then the weight and its part of the total.
struct alignas(16) TokenScale {
  float k, exponent, weight, total;
};

// Lane of a warp as the MMA sees it.
struct Lane {
  int row, column;  // lane / 4, lane % 4
};

LLMQAT_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Query heads of one cached head, of a step: [half of the head][row][lane column] of one pair each,
// and a row of zeros, which is rows 8 to 15 of the MMA.
inline constexpr int kHalfBytes = 128, kStepBytes = 2 * kHalfBytes + 16;

template <bool kPacked, int kDim, bool kRotate>
struct Tile {
  using Form = Codes<kPacked>;
  static constexpr int kRow = kPacked ? kDim / 2 : kDim;  // bytes
  static constexpr int kWords = kRow / 32;                // of a chunk
  static constexpr int kTokens = 16;
  static constexpr int kColumns = kTokens / 8;  // n8 columns of S
  static constexpr int kSteps = kDim / 16;      // k16 steps of S, m16 rows of O^T
  static constexpr int kTable = kDim * 2;       // bytes of a token's cos and sin

  static constexpr int kQueryBytes = kSteps * kStepBytes;  // of one cached head's query heads
  static constexpr int kTableBytes = kRotate ? kAttentionSplit * kTable : 0;
  static constexpr int kMergeBytes = kAttentionWarps * kAttentionHeadRows * (kDim + 3) * 4;
  // The tables are read for the last time before the sums are merged in their place.
  static constexpr int kWorkBytes = kTableBytes > kMergeBytes ? kTableBytes : kMergeBytes;
};

// Offset of a token's cos and sin of the pairs 2 * step and 2 * step + 1 of lane column `column`:
// 16 bytes. Odd tokens swap neighbouring steps, so that 8 lanes never meet in a bank.
template <class T>
LLMQAT_DEVICE int table_offset(int token, int step, int column) {
  return token * T::kTable + (step ^ (token & 1)) * 64 + column * 16;
}

LLMQAT_DEVICE TokenScale token_scale(float k_scale, float v_scale, float log2_scaling) {
  // v_scale = weight * 2^e; a NaN or 0 stays in the weight.
  int field = static_cast<int>(float_bits(v_scale) >> 23 & 0xFFu);
  field = field < 1 ? 1 : field > 253 ? 253 : field;
  const float inverse = bits_float(static_cast<uint32_t>(254 - field) << 23);  // 2^-e
  return {k_scale * log2_scaling, static_cast<float>(field - 127), v_scale * inverse, inverse};
}

// The scales of the split for `heads` cached heads from `first` on; tokens past `count` weigh 0.
LLMQAT_DEVICE void stage_scales(const AttentionArgs& args, int slot, int start, int count,
                                int first, int heads, TokenScale* staged) {
  const float lowest = bits_float(kInfBits | 0x80000000u);
  for (int i = static_cast<int>(threadIdx.x); i < heads * kAttentionSplit; i += kAttentionThreads) {
    const int token = i % kAttentionSplit;
    const int head = first + i / kAttentionSplit;
    TokenScale scale = {0.0f, lowest, 0.0f, 0.0f};
    if (token < count && head < args.cache.heads) {
      const TokenPlace at = token_place(args.cache, slot, int64_t{start} + token);
      const float nan = bits_float(0x7FC00000u);
      const int64_t from = scale_index(args.cache, at, head);
      scale = at.block < 0 ? TokenScale{nan, 0.0f, nan, nan}
                           : token_scale(args.cache.k_scale[from], args.cache.v_scale[from],
                                         args.p.scaling * kLog2E);
    }
    staged[i] = scale;
  }
}

// cos and sin of the split's tokens as fp16 pairs in the order of the codes' pairs.
template <class T>
LLMQAT_DEVICE void stage_tables(const AttentionArgs& args, int start, int count,
                                unsigned char* staged) {
  constexpr int kItems = T::kSteps / 2 * 4;  // of a token
  using Form = typename T::Form;
  constexpr int kHalf = T::kSteps * 8;  // columns of half a head
  for (int i = static_cast<int>(threadIdx.x); i < count * kItems; i += kAttentionThreads) {
    const int token = i / kItems, step = i % kItems / 4, column = i % 4;
    Word4 w{{0x7E007E00u, 0x7E007E00u, 0x7E007E00u, 0x7E007E00u}};  // NaN: no such table row
    if (start + token < args.tables.rows) {
      const int64_t row = int64_t{start + token} * kHalf + column * (kHalf / 4);
      const int first = Form::first_column(2 * step);
      const int second = Form::second_column(2 * step);
      // The next pair has the columns after these.
      const auto c0 = load_vec<float, 2>(args.tables.cos + row + first);
      const auto c1 = load_vec<float, 2>(args.tables.cos + row + second);
      const auto s0 = load_vec<float, 2>(args.tables.sin + row + first);
      const auto s1 = load_vec<float, 2>(args.tables.sin + row + second);
      w = {{half2_pack(c0.v[0], c1.v[0]), half2_pack(s0.v[0], s1.v[0]),
            half2_pack(c0.v[1], c1.v[1]), half2_pack(s0.v[1], s1.v[1])}};
    }
    store_16(staged + table_offset<T>(token, step, column), w);
  }
}

// What a warp needs of its query heads.
struct Query {
  const unsigned char* row;  // what the lane gives to ldmatrix for step 0
  float start;               // of every sum: takes the bias of the codes away
  float unit;                // score of a sum of 1
};

// Brings the largest |q| of a head to [2^14, 2^15): bf16 values then lose nothing as fp16.
template <class T, bool kRotate>
LLMQAT_DEVICE Query load_query(const AttentionArgs& args, int64_t query, int64_t head, bool real,
                               Lane lane, unsigned char* staged, bool owner) {
  constexpr int kHalf = T::kSteps * 8, kChunk = kHalf / 4;
  using Form = typename T::Form;
  float v[T::kSteps][4];
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < T::kSteps; ++j) {
    const int64_t at = query_offset(args, query, head) + lane.column * kChunk;
    const int columns[2] = {Form::first_column(j), Form::second_column(j)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[j][i] =
          real ? load_float(args.p.q.data, args.p.dtype, at + columns[i % 2] + i / 2 * kHalf) : 0;
      const uint32_t m = magnitude_bits(v[j][i]);
      largest = m > largest ? m : largest;
    }
  }
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  uint32_t field = largest >> 23;
  field = largest == 0 || field == 255 ? 141u : field < 15 ? 15u : field;  // 141: as it is
  const float up = bits_float((268 - field) << 23), down = bits_float((field - 14) << 23);

  float bias = 0.0f;
#pragma unroll
  for (int j = 0; j < T::kSteps; ++j) {
    const float scale = kRotate ? up : up / Form::factor(j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = half2_pack(v[j][2 * i] * scale, v[j][2 * i + 1] * scale);
      bias += (to_float(fp16{static_cast<uint16_t>(pair & 0xFFFFu)}) +
               to_float(fp16{static_cast<uint16_t>(pair >> 16)})) *
              (Form::bias(j) * Form::factor(j));
      unsigned char* const to =
          staged + j * kStepBytes + i * kHalfBytes + lane.row * 16 + lane.column * 4;
      if (owner) *reinterpret_cast<uint32_t*>(to) = pair;
    }
    if (owner && lane.row == 0) {
      reinterpret_cast<uint32_t*>(staged + j * kStepBytes + 2 * kHalfBytes)[lane.column] = 0;
    }
  }
  bias += shuffle_xor(bias, 1);
  bias += shuffle_xor(bias, 2);
  const int thread = static_cast<int>(threadIdx.x % 32), matrix = thread / 8;
  const int row = matrix % 2 == 0 ? matrix / 2 * kHalfBytes + thread % 8 * 16 : 2 * kHalfBytes;
  return {staged + row, kRotate ? 0.0f : -bias * kDenormal,
          kRotate ? down : down * (1.0f / kDenormal)};
}

// What a lane holds of a tile: for K the two halves of one token's chunk, for V two tokens' chunks.
template <class T>
struct Raw {
  uint32_t w[T::kColumns][2][T::kWords];
};

// The codes of a tile of one cached head; tokens past `last` are read as `last`.
struct TileRows {
  const uint8_t *k, *v;
  int last;
};

// Of a head's token 0 in a block of the cache; contiguous: in the slot.
template <class T>
LLMQAT_DEVICE int64_t head_bytes(const AttentionArgs& args, int slot, int head) {
  const int64_t block = args.cache.page_table == nullptr ? slot : 0;
  return (block * args.cache.heads + head) * args.cache.block_tokens * T::kRow;
}

// `first` is the tile's first token, `left` the tokens of the slot from there on.
template <class T>
LLMQAT_DEVICE TileRows tile_rows(const AttentionArgs& args, int64_t head, int slot, int first,
                                 int left) {
  int64_t bytes = head;
  if (args.cache.page_table == nullptr) {
    bytes += int64_t{first} * T::kRow;
  } else {
    const TokenPlace at = token_place(args.cache, slot, first);
    const int64_t block = at.block < 0 ? 0 : at.block;  // its scales are NaN
    bytes += block * args.block_bytes + at.offset * T::kRow;
  }
  return {static_cast<const uint8_t*>(args.cache.k) + bytes,
          static_cast<const uint8_t*>(args.cache.v) + bytes, smaller(left, T::kTokens) - 1};
}

template <class T>
LLMQAT_DEVICE void load_keys(const TileRows& rows, Lane lane, Raw<T>& raw) {
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
    const int token = smaller(8 * c + lane.row, rows.last);
    const uint8_t* const p = rows.k + (token * T::kRow + lane.column * (T::kWords * 4));
    load_codes(p, raw.w[c][0]);
    load_codes(p + T::kRow / 2, raw.w[c][1]);
  }
}

template <class T>
LLMQAT_DEVICE void load_values(const TileRows& rows, Lane lane, Raw<T>& raw) {
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = smaller(8 * c + 2 * lane.column + i, rows.last);
      load_codes(rows.v + (token * T::kRow + lane.row * (T::kWords * 4)), raw.w[c][i]);
    }
  }
}

}  // namespace llmqat
