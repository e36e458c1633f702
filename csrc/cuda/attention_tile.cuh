// What a block of attention_mma.cu prepares and what its warps load: scales, tables and queries in
// shared memory, tiles of codes in registers.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/attention_codes.cuh"

namespace llmqat {

inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr float kLog2E = 1.4426950408889634f;

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
  static constexpr int kRow = kPacked ? kDim / 2 : kDim;     // bytes
  static constexpr int kWords = kRow / 32;                   // of a chunk
  static constexpr int kColumns = kAttentionTileTokens / 8;  // n8 columns of S
  static constexpr int kSteps = kDim / 16;                   // k16 steps of S, m16 rows of O^T
  static constexpr int kTable = kDim * 2;                    // bytes of a token's cos and sin

  static constexpr int kQueryBytes = kSteps * kStepBytes;  // of one cached head's query heads
  // Whether a tile of K and of V is small enough for both tiles to be in registers twice.
  static constexpr bool kDeep = kWords <= 2;
};

// The tokens of a block: all of a split, or every pieces-th tile of it.
struct Slice {
  int start, count;   // the split: its first token in the slot, its tokens
  int piece, pieces;  // tile t of the block is tile piece + t * pieces of the split
};

// Token of the split.
LLMQAT_DEVICE int slice_token(const Slice& slice, int token) {
  return (token / kAttentionTileTokens * slice.pieces + slice.piece) * kAttentionTileTokens +
         token % kAttentionTileTokens;
}

// Tokens that the block stages at most, a power of two.
LLMQAT_DEVICE int slice_tokens(const Slice& slice) { return kAttentionSplit / slice.pieces; }

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

// Scales on their way: of one token, for every pieces-th cached head of the block.
template <int kHeads>
struct RawScales {
  float k[kHeads], v[kHeads];
  bool there;  // a page that the table names
};

// The scales of the block's tokens for the cached heads from `first` on. No more than kHeads a
// thread: a block has 4 heads of all of its tokens, or 8 of the tokens of a half and less.
template <int kHeads>
LLMQAT_DEVICE RawScales<kHeads> load_scales(const AttentionArgs& args, int slot, const Slice& slice,
                                            int first, int heads) {
  const int tokens = slice_tokens(slice), thread = static_cast<int>(threadIdx.x);
  const int token = slice_token(slice, thread & (tokens - 1)), own = thread / tokens;
  const TokenPlace at =
      token_place(args.cache, slot, int64_t{slice.start} + smaller(token, slice.count - 1));
  const TokenPlace read{at.block < 0 ? 0 : at.block, at.offset};
  const int last = static_cast<int>(args.cache.heads) - 1;
  RawScales<kHeads> raw{};
  raw.there = at.block >= 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = own + i * slice.pieces;
    if (head >= heads) break;
    const int64_t from = scale_index(args.cache, read, smaller(first + head, last));
    raw.k[i] = args.cache.k_scale[from];
    raw.v[i] = args.cache.v_scale[from];
  }
  return raw;
}

// To shared memory, as weights; tokens past the split weigh 0.
template <int kHeads>
LLMQAT_DEVICE void stage_scales(const AttentionArgs& args, const RawScales<kHeads>& raw,
                                const Slice& slice, int heads, TokenScale* staged) {
  const float lowest = bits_float(kInfBits | 0x80000000u), nan = bits_float(0x7FC00000u);
  const int tokens = slice_tokens(slice), thread = static_cast<int>(threadIdx.x);
  const int place = thread & (tokens - 1), own = thread / tokens;
  const bool counts = slice_token(slice, place) < slice.count;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = own + i * slice.pieces;
    if (head >= heads) break;
    TokenScale scale = token_scale(raw.k[i], raw.v[i], args.p.scaling * kLog2E);
    if (!raw.there) scale = {nan, 0.0f, nan, nan};
    if (!counts) scale = {0.0f, lowest, 0.0f, 0.0f};
    staged[head * tokens + place] = scale;
  }
}

// 8 neighbouring columns of a table row.
struct TableRow {
  Vec<float, 4> low, high;
  LLMQAT_DEVICE float at(int column) const {
    return column < 4 ? low.v[column] : high.v[column - 4];
  }
};

LLMQAT_DEVICE TableRow load_row(const float* p) {
  return {load_vec<float, 4>(p), load_vec<float, 4>(p + 4)};
}

// The pairs of step `half` of two, as fp16; NaN where there is no such table row.
template <class T>
LLMQAT_DEVICE Word4 table_word(const TableRow& cosine, const TableRow& sine, int half, bool there) {
  using Form = typename T::Form;
  Word4 w;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = Form::first_column(2 * half + i), second = Form::second_column(2 * half + i);
    w.v[2 * i] = there ? half2_pack(cosine.at(first), cosine.at(second)) : 0x7E007E00u;
    w.v[2 * i + 1] = there ? half2_pack(sine.at(first), sine.at(second)) : 0x7E007E00u;
  }
  return w;
}

// cos and sin of the block's tokens as fp16 pairs in the order of the codes' pairs. An item is two
// steps of one lane column: 8 columns of the tables. A thread has the same columns of every
// kRound-th token, and loads kAhead items before it converts the first. 8 threads store to all
// banks once.
template <class T>
LLMQAT_DEVICE void stage_tables(const AttentionArgs& args, const Slice& slice,
                                unsigned char* staged) {
  constexpr int kPairs = T::kSteps / 4, kRound = kAttentionThreads / (4 * kPairs), kAhead = 2;
  constexpr int kHalf = T::kSteps * 8;  // columns of half a head
  const int thread = static_cast<int>(threadIdx.x), tokens = slice_tokens(slice);
  const int column = thread % 4, pair = thread / 8 % kPairs;
  const int rows = static_cast<int>(args.tables.rows);
  const int offset = column * (kHalf / 4) + 8 * pair;
  for (int own = thread / (8 * kPairs) * 2 + thread / 4 % 2; own < tokens; own += kAhead * kRound) {
    if (slice_token(slice, own) >= slice.count) break;
    TableRow cosine[kAhead], sine[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = slice.start + slice_token(slice, own + i * kRound);
      const int64_t at = int64_t{smaller(token, rows - 1)} * kHalf + offset;
      cosine[i] = load_row(args.tables.cos + at);
      sine[i] = load_row(args.tables.sin + at);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int to = own + i * kRound;
      const bool there = slice.start + slice_token(slice, to) < rows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Word4 word = table_word<T>(cosine[i], sine[i], half, there);
        if (to < tokens) store_16(staged + table_offset<T>(to, 2 * pair + half, column), word);
      }
    }
  }
}

// What a warp needs of its query heads.
struct Query {
  const unsigned char* row;  // what the lane gives to ldmatrix for step 0
  float start;               // of every sum: takes the bias of the codes away
  float unit;                // score of a sum of 1
};

// A lane's columns of its query head as they are in memory: [half of the head][two columns].
template <class T>
struct RawQuery {
  static constexpr int kWords = T::kSteps;
  uint32_t w[2][kWords];
};

template <class T>
LLMQAT_DEVICE RawQuery<T> load_query(const AttentionArgs& args, int64_t query, int64_t head,
                                     bool real, Lane lane) {
  constexpr int kHalf = T::kSteps * 8;
  RawQuery<T> raw{};
  if (!real) return raw;
  const uint16_t* const from = static_cast<const uint16_t*>(args.p.q.data) +
                               query_offset(args, query, head) + lane.column * (kHalf / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < RawQuery<T>::kWords; i += 4) {
      const Word4 loaded = load_16(from + half * kHalf + 2 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) raw.w[half][i + k] = loaded.v[k];
    }
  }
  return raw;
}

// Columns first, second of the first half of the chunk, then of the second half, for every step.
template <class T, class F>
LLMQAT_DEVICE void unpack_query(const RawQuery<T>& raw, float (&v)[T::kSteps][4], F value) {
  using Form = typename T::Form;
#pragma unroll
  for (int j = 0; j < T::kSteps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = i % 2 == 0 ? Form::first_column(j) : Form::second_column(j);
      const uint32_t word = raw.w[i / 2][column / 2];
      v[j][i] = value(static_cast<uint16_t>(column % 2 == 0 ? word & 0xFFFFu : word >> 16));
    }
  }
}

// Brings the largest |q| of a head to [2^14, 2^15): bf16 values then lose nothing as fp16.
template <class T, bool kRotate>
LLMQAT_DEVICE Query stage_query(const AttentionArgs& args, const RawQuery<T>& raw, Lane lane,
                                unsigned char* staged, bool owner) {
  using Form = typename T::Form;
  float v[T::kSteps][4];
  if (args.p.dtype == LLMQAT_BFLOAT16) {
    unpack_query(raw, v, [](uint16_t bits) { return to_float(bf16{bits}); });
  } else {
    unpack_query(raw, v, [](uint16_t bits) { return to_float(fp16{bits}); });
  }
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < T::kSteps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
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

// `first` is the tile's first token, `left` the tokens of the split from there on.
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
          static_cast<const uint8_t*>(args.cache.v) + bytes,
          smaller(left, kAttentionTileTokens) - 1};
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
