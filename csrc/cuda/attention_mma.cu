// attention_decode on tensor cores: fp16 and bf16 queries over int8 and int4 caches.
//
// Math:     spec 9. With u_t = log2(e) scaling k_scale_t (q . k_t) + x_t, x_t the exponent of
//           v_scale_t: sums = sum_t 2^(u_t - top) (v_scale_t 2^-x_t) v_t over the split's tokens
//           and total = sum_t 2^(u_t - top) 2^-x_t. So no fp16 weight is above 2, whatever v_scale.
// Shapes:   q [n, H, D]; cache and tables: kv_cache.h; partial sums: attention_args.cuh.
// Dtypes:   codes, q and weights meet as fp16 (q after a power of two per head), sums in fp32.
// Tiling:   a warp takes tiles of 16 tokens of one part of a split (256 tokens) of one cached head,
//           for 8 query heads: up to 2 KiB of K and of V in registers, loaded a tile ahead. A block
//           is all parts of 1, 2 or 4 heads, or one part of up to 8 (attention_plan).
//           S[head, token] = q k: heads are the rows of the MMA, so that its result is the second
//           operand of O^T[column, head] = V^T p as it stands. `paper`: cos and sin of the
//           block's tokens in shared memory as fp16, shared by its heads, which rotate K in
//           registers.
// Cost:     memory: one read of codes and scales, 2 x (D + 2) x 4 bytes a query head and block for
//           the partial sums. docs/kernels/cuda_attention.md counts instructions.
// Numerics: 2x rule. Codes exact; the rotation rounds twice in fp16, weights have 22 bits. The sums
//           go by the tokens' places alone: batch, pages, blocks and schedule change no bit.
// Edges:    scores past the length are -inf by select and their weights 0; the rows read in their
//           place are the last token's, whose codes are finite. NaN scales and queries give NaN.
// Limits:   head_dim 64 or 128; groups of more than 8 query heads read the cache once per 8.
// Tests:    tests/emulator/test_attention_decode.py
// Bench:    python -m benchmarks.run --op attention_decode --device cuda
#include "cuda/attention_merge.cuh"

namespace llmqat {
namespace {

// s[c][0..1]: q . k of the lane's head and tokens 8 c + 2 * lane.column + {0, 1} of the tile.
template <class T, bool kRotate>
LLMQAT_DEVICE void multiply_keys(const Query& q, const Raw<T>& keys, const unsigned char* tables,
                                 int last, Lane lane, float (&s)[T::kColumns][2]) {
  using Form = typename T::Form;
  float acc[T::kColumns][4];
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) acc[c][0] = acc[c][1] = q.start, acc[c][2] = acc[c][3] = 0;
#pragma unroll
  for (int step = 0; step < T::kSteps / 2; ++step) {
    uint32_t a[2][4];
    ldmatrix_x4(a[0], q.row + 2 * step * kStepBytes);
    ldmatrix_x4(a[1], q.row + (2 * step + 1) * kStepBytes);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      const int token = smaller(8 * c + lane.row, last);
      Word4 table;
      if constexpr (kRotate) table = load_16(tables + table_offset<T>(token, step, lane.column));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * step + i;
        uint32_t b[2];
        if constexpr (kRotate) {
          const uint32_t x1 = Form::exact_pair(keys.w[c][0], j);
          const uint32_t x2 = Form::exact_pair(keys.w[c][1], j);
          const uint32_t cosine = table.v[2 * i], sine = table.v[2 * i + 1];
          b[0] = half2_fma(half2_neg(x2), sine, half2_mul(x1, cosine));
          b[1] = half2_fma(x1, sine, half2_mul(x2, cosine));
        } else {
          b[0] = Form::biased_pair(keys.w[c][0], j);
          b[1] = Form::biased_pair(keys.w[c][1], j);
        }
        mma_m16n8k16_f16(acc[c], a[i], b);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
    s[c][0] = acc[c][0] * q.unit;
    s[c][1] = acc[c][1] * q.unit;
  }
}

// Scores to weights; moves `top` and rescales the sums where a score is above it.
template <class T>
LLMQAT_DEVICE void soften(const TokenScale* scales, Lane lane, float (&s)[T::kColumns][2],
                          Sums<T>& sums) {
  float top = sums.top;
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto scale = load_vec<float, 2>(&scales[8 * c + 2 * lane.column + i].k);
      s[c][i] = s[c][i] * scale.v[0] + scale.v[1];
      top = fmaxf(top, s[c][i]);
    }
  }
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
  if (ballot(top != sums.top) != 0) {
    const float shrink = top == sums.top ? 1.0f : exp2_approx(sums.top - top);
    const float left = shuffle(shrink, 8 * lane.column);  // heads 2 * column and 2 * column + 1
    const float right = shuffle(shrink, 8 * lane.column + 4);
#pragma unroll
    for (int m = 0; m < T::kSteps; ++m) {
      sums.o[m][0] *= left;
      sums.o[m][1] *= right;
      sums.o[m][2] *= left;
      sums.o[m][3] *= right;
    }
    sums.total *= shrink;
    sums.weight *= shrink;
    sums.top = top;
  }
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto scale = load_vec<float, 2>(&scales[8 * c + 2 * lane.column + i].weight);
      const float p = exp2_approx(s[c][i] - top);
      sums.total += p * scale.v[1];
      s[c][i] = p * scale.v[0];
      sums.weight += s[c][i];
    }
  }
}

// Two weights as fp16 and what fp16 lost of them.
LLMQAT_DEVICE void split_weights(const float (&p)[2], uint32_t& high, uint32_t& low) {
  high = half2_pack(p[0], p[1]);
  low = half2_pack(p[0] - to_float(fp16{static_cast<uint16_t>(high & 0xFFFFu)}),
                   p[1] - to_float(fp16{static_cast<uint16_t>(high >> 16)}));
}

// o += V^T p. One fp16 weight would be a rounding that plain torch
// does not do (it rounds V), and a row of few tokens would miss the 2x rule; two make p exact to 22
// bits for tensor core time that is there.
template <class T>
LLMQAT_DEVICE void add_values(const Raw<T>& values, const float (&p)[T::kColumns][2],
                              Sums<T>& sums) {
  using Form = typename T::Form;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 2) {
    uint32_t high[2], low[2];
    split_weights(p[c], high[0], low[0]);
    split_weights(p[c + 1], high[1], low[1]);
#pragma unroll
    for (int m = 0; m < T::kSteps; ++m) {
      uint32_t a[4];
      Form::biased_column(values.w[c][0], values.w[c][1], m, a[0], a[1]);
      Form::biased_column(values.w[c + 1][0], values.w[c + 1][1], m, a[2], a[3]);
      mma_m16n8k16_f16(sums.o[m], a, low);
      mma_m16n8k16_f16(sums.o[m], a, high);
    }
  }
}

// Where a warp is in its tokens: the tile's first token in the slot, the tokens of the split from
// there on, and what the block has staged for them.
struct Cursor {
  int token, left;
  const unsigned char* tables;
  const TokenScale* scales;
};

// One tile, and the loads of the next one into next_keys (which may be keys) and next_values; false
// after the last tile. `step`: from tile to tile of a warp in the split, `own` among the tokens
// that the block has staged.
template <class T, bool kRotate>
LLMQAT_DEVICE bool attend_tile(const AttentionArgs& args, const Query& q, int64_t bytes, int slot,
                               int step, int own, Lane lane, const Raw<T>& keys,
                               const Raw<T>& values, Raw<T>& next_keys, Raw<T>& next_values,
                               Cursor& at, Sums<T>& sums) {
  const int last = smaller(at.left, kAttentionTileTokens) - 1;
  at.token += step;
  at.left -= step;
  const auto load_next = [&] {
    const TileRows rows = tile_rows<T>(args, bytes, slot, at.token, at.left);
    load_keys<T>(rows, lane, next_keys);
    load_values<T>(rows, lane, next_values);
  };
  if constexpr (T::kDeep) {
    // All loads of a loop share one scoreboard: if the next tile's were issued first, a wait for
    // this tile's would be one for them too. So wait here: gridDim.z - 1 is 0, which the compiler
    // does not know.
    const int zero = static_cast<int>(keys.w[0][0][0] & (gridDim.z - 1));
    if (at.left + zero > 0) load_next();
  }
  float s[T::kColumns][2];
  multiply_keys<T, kRotate>(q, keys, at.tables, last, lane, s);
  if constexpr (!T::kDeep) {
    if (at.left > 0) load_next();
  }
  soften<T>(at.scales, lane, s, sums);
  add_values<T>(values, s, sums);
  at.tables += own * T::kTable;
  at.scales += own;
  return at.left > 0;
}

template <bool kPacked, int kDim, bool kRotate>
LLMQAT_KERNEL_MIN_BLOCKS(kAttentionThreads, kAttentionBlocksPerSm)
attention_mma_kernel(AttentionArgs args, AttentionBlock block) {
  using T = Tile<kPacked, kDim, kRotate>;
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  const BlockPlace place = block_place(args, block);
  clear_ticket(args, place.query, place.piece);
  const QueryRange range = query_range(args, place.query);
  const int start = place.piece / args.pieces * kAttentionSplit;
  const Slice slice{start, smaller(range.length - start, kAttentionSplit),
                    place.piece % args.pieces, args.pieces};
  if (slice.piece * kAttentionTileTokens >= slice.count) return;  // the whole block

  const int warp = static_cast<int>(threadIdx.x / 32), part = warp % block.parts;
  const int own = warp / block.parts, kv_head = place.first_head + own;
  const Lane lane{static_cast<int>(threadIdx.x % 32) / 4, static_cast<int>(threadIdx.x % 4)};
  const bool busy = own < block.heads && kv_head < args.cache.heads;

  unsigned char* const queries = shared + block.work_bytes;
  TokenScale* const scales = reinterpret_cast<TokenScale*>(queries + block.heads * T::kQueryBytes);
  const bool real = busy && place.first_row + lane.row < args.group;
  const int heads = kRotate ? 1 : block.heads;  // that have scales of their own

  // Everything that comes from memory is on its way before the first of it is waited for.
  const auto raw_query = load_query<T>(
      args, place.query, int64_t{kv_head} * args.group + place.first_row + lane.row, real, lane);
  const auto raw_scales =
      load_scales<kRotate ? 1 : 4>(args, range.slot, slice, place.first_head, heads);
  Raw<T> keys, values, other_keys, other_values;
  const int64_t bytes = head_bytes<T>(args, range.slot, kv_head);
  const int token = part * kAttentionTileTokens, first = slice_token(slice, token);
  Cursor at{start + first, busy ? slice.count - first : 0, shared + token * T::kTable,
            scales + token + (kRotate ? 0 : own * slice_tokens(slice))};
  if (at.left > 0) {
    const TileRows rows = tile_rows<T>(args, bytes, range.slot, at.token, at.left);
    load_keys<T>(rows, lane, keys);
    load_values<T>(rows, lane, values);
  }
  if constexpr (kRotate) stage_tables<T>(args, slice, shared);
  const Query q = stage_query<T, kRotate>(args, raw_query, lane, queries + own * T::kQueryBytes,
                                          part == 0 && own < block.heads);
  stage_scales(args, raw_scales, slice, heads, scales);
  Sums<T> sums{};
  sums.top = bits_float(kInfBits | 0x80000000u);
  sync_block();

  const int own_step = block.parts * kAttentionTileTokens, step = own_step * args.pieces;
  const auto attend = [&](Raw<T>& k, Raw<T>& v, Raw<T>& next_k, Raw<T>& next_v) {
    return attend_tile<T, kRotate>(args, q, bytes, range.slot, step, own_step, lane, k, v, next_k,
                                   next_v, at, sums);
  };
  Raw<T>& turn = T::kDeep ? other_keys : keys;
  bool more = at.left > 0;
  while (more) {  // registers take turns: none is moved
    more = attend(keys, values, turn, other_values) && attend(turn, other_values, keys, values);
  }
  finish<T>(args, block, sums, lane, shared);
}

template <bool kPacked, int kDim, bool kRotate>
void launch(const AttentionArgs& args, int heads, void* stream) {
  using T = Tile<kPacked, kDim, kRotate>;
  const int parts = static_cast<int>(attention_parts(args.cache.heads)) / args.pieces;
  const int tokens = kAttentionSplit / args.pieces;
  // The tables are read for the last time before the sums are merged in their place.
  const int tables = kRotate ? tokens * T::kTable : 0;
  const int merged = args.pieces == 1 ? Merge<T>::kBytes : 0;
  const AttentionBlock block{heads, parts, tables > merged ? tables : merged};
  const int64_t chunks = (int64_t{args.group} + kAttentionHeadRows - 1) / kAttentionHeadRows;
  const int64_t bytes = block.work_bytes + heads * T::kQueryBytes +
                        (args.cache.pre_rope ? 1 : heads) * tokens * int64_t{sizeof(TokenScale)};
  const dim3 grid(static_cast<unsigned>(args.p.n * args.splits * args.pieces),
                  static_cast<unsigned>((args.cache.heads + heads - 1) / heads * chunks));
  LLMQAT_LAUNCH_SHARED((attention_mma_kernel<kPacked, kDim, kRotate>), grid,
                       dim3(kAttentionThreads), static_cast<size_t>(bytes), stream, args, block);
}

}  // namespace

int launch_attention_mma(const AttentionArgs& args, int heads, void* stream) {
  const bool packed = args.cache.storage == LLMQAT_KV_INT4, rotate = args.cache.pre_rope;
  const bool wide = args.cache.head_dim == 128;
  using Launch = void (*)(const AttentionArgs&, int, void*);
  const Launch table[2][2][2] = {{{launch<false, 64, false>, launch<false, 64, true>},
                                  {launch<false, 128, false>, launch<false, 128, true>}},
                                 {{launch<true, 64, false>, launch<true, 64, true>},
                                  {launch<true, 128, false>, launch<true, 128, true>}}};
  table[packed][wide][rotate](args, heads, stream);
  return cudaGetLastError();
}

}  // namespace llmqat
