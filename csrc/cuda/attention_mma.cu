// attention_decode on tensor cores: fp16 and bf16 queries over int8 and int4 caches.
//
// Math:     spec 9. With u_t = log2(e) scaling k_scale_t (q . k_t) + x_t, x_t the exponent of
//           v_scale_t: sums = sum_t 2^(u_t - top) (v_scale_t 2^-x_t) v_t over the split's tokens
//           and total = sum_t 2^(u_t - top) 2^-x_t. So no fp16 weight is above 2, whatever v_scale.
// Shapes:   q [n, H, D]; cache and tables: kv_cache.h; partial sums: attention_args.cuh.
// Dtypes:   codes, q and weights meet as fp16 (q after a power of two per head), sums in fp32.
// Tiling:   a block is 256 tokens of 1, 2 or 4 cached heads for one query. A warp takes tiles of 16
//           tokens for 8 query heads: up to 2 KiB of K and of V in registers, loaded a tile ahead.
//           S[head, token] = q k: heads are the rows of the MMA, so that its result is the second
//           operand of O^T[column, head] = V^T p as it stands. `paper`: cos and sin of the
//           split in shared memory as fp16, shared by the block's heads, which rotate K in
//           registers.
// Cost:     memory: one read of codes and scales, 2 x (D + 2) x 4 bytes a head and split for the
//           partial sums. docs/kernels/cuda_attention.md counts instructions.
// Numerics: 2x rule. Codes exact; the rotation rounds twice in fp16, weights have 22 bits. The sums
//           go by the tokens' places alone: batch, pages and schedule change no bit.
// Edges:    scores past the length are -inf by select and their weights 0; the rows read in their
//           place are the last token's, whose codes are finite. NaN scales and queries give NaN.
// Limits:   head_dim 64 or 128; groups of more than 8 query heads read the cache once per 8.
// Tests:    tests/emulator/test_attention_decode.py
// Bench:    python -m benchmarks.run --op attention_decode --device cuda
#include "cuda/attention_tile.cuh"

namespace llmqat {
namespace {

// s[c][0..1]: q . k of the lane's head and tokens 8 c + 2 * lane.column + {0, 1} of the tile.
template <class T, bool kRotate>
LLMQAT_DEVICE void multiply_keys(const Query& q, const Raw<T>& keys, const unsigned char* tables,
                                 int first, int last, Lane lane, float (&s)[T::kColumns][2]) {
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
      const int token = first + smaller(8 * c + lane.row, last);
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

// The sums of a warp so far: rows are columns of the head, columns are query heads.
template <class T>
struct Sums {
  float o[T::kSteps][4];  // biased
  // Of head lane.row; all but the maximum are the lane's own share.
  float top, total, weight;
};

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

// Adds the sums of the warps that share a head, in their order, and writes the partial sums.
template <class T>
LLMQAT_DEVICE void merge(const AttentionArgs& args, const Sums<T>& sums, int query, int split,
                         int first_head, int first_row, int parts, Lane lane,
                         unsigned char* shared) {
  constexpr int kDim = T::kSteps * 16, kRows = kAttentionHeadRows;
  float* const tops = reinterpret_cast<float*>(shared);  // [warp, row]
  float* const totals = tops + kAttentionWarps * kRows;
  float* const weights = totals + kAttentionWarps * kRows;
  float* const values = weights + kAttentionWarps * kRows;  // [warp, row, column]
  const int warp = static_cast<int>(threadIdx.x / 32), group = warp / parts * parts;
  float total = sums.total + shuffle_xor(sums.total, 1);
  float weight = sums.weight + shuffle_xor(sums.weight, 1);
  total += shuffle_xor(total, 2);
  weight += shuffle_xor(weight, 2);
  sync_block();  // the tables are done with
  if (lane.column == 0) {
    tops[warp * kRows + lane.row] = sums.top;
    totals[warp * kRows + lane.row] = total;
    weights[warp * kRows + lane.row] = weight;
  }
  sync_block();
  float share[2], bias[2];  // of the lane's two heads: the factor of their sums, what they exceed
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane.column + i;
    float top = tops[group * kRows + row];
    for (int part = 1; part < parts; ++part) top = fmaxf(top, tops[(group + part) * kRows + row]);
    share[i] = exp2_approx(tops[warp * kRows + row] - top) * (1.0f / kDenormal);
    bias[i] = weights[warp * kRows + row] * (T::Form::bias(0) * kDenormal);
  }
#pragma unroll
  for (int m = 0; m < T::kSteps; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = i < 2 ? 1.0f : T::Form::kOddFactor;
      const int column = lane.row * (kDim / 8) + 2 * m + i / 2, row = 2 * lane.column + i % 2;
      values[(warp * kRows + row) * kDim + column] =
          (sums.o[m][i] - bias[i % 2] * factor) * (share[i % 2] * (1.0f / factor));
    }
  }
  sync_block();
  const int heads = kAttentionWarps / parts;
  for (int i = static_cast<int>(threadIdx.x); i < heads * kRows * kDim; i += kAttentionThreads) {
    const int column = i % kDim, row = i / kDim % kRows, own = i / kDim / kRows;
    const int head = first_head + own;
    if (head >= args.cache.heads || first_row + row >= args.group) continue;
    const int at = own * parts * kRows + row;
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += values[(at + part * kRows) * kDim + column];
    const Partial to = partial_of(args, query, int64_t{head} * args.group + first_row + row, split);
    to.sums[column] = sum;
    if (column != 0) continue;
    float top = tops[at], all = 0.0f;
    for (int part = 1; part < parts; ++part) top = fmaxf(top, tops[at + part * kRows]);
    for (int part = 0; part < parts; ++part) {
      all += totals[at + part * kRows] * exp2_approx(tops[at + part * kRows] - top);
    }
    *to.top = top * kLn2;
    *to.total = all;
  }
}

template <bool kPacked, int kDim, bool kRotate>
LLMQAT_KERNEL_MIN_BLOCKS(kAttentionThreads, 2)
attention_mma_kernel(AttentionArgs args, int block_heads) {
  using T = Tile<kPacked, kDim, kRotate>;
  take_turn();
  LLMQAT_DYNAMIC_SHARED(shared);
  const int query = static_cast<int>(blockIdx.x) / args.splits;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  clear_ticket(args, query, split);
  const QueryRange range = query_range(args, query);
  const int start = split * kAttentionSplit;
  if (start >= range.length) return;  // the whole block
  const int count = smaller(range.length - start, kAttentionSplit);

  const int chunks = (args.group + kAttentionHeadRows - 1) / kAttentionHeadRows;
  const int first_head = static_cast<int>(blockIdx.y) / chunks * block_heads;
  const int first_row = static_cast<int>(blockIdx.y) % chunks * kAttentionHeadRows;
  const int warp = static_cast<int>(threadIdx.x / 32), parts = kAttentionWarps / block_heads;
  const int kv_head = first_head + warp / parts;
  const Lane lane{static_cast<int>(threadIdx.x % 32) / 4, static_cast<int>(threadIdx.x % 4)};

  unsigned char* const tables = shared;
  unsigned char* const queries = shared + T::kWorkBytes;
  TokenScale* const scales = reinterpret_cast<TokenScale*>(queries + block_heads * T::kQueryBytes);
  const int tiles = kv_head < args.cache.heads ? (count + T::kTokens - 1) / T::kTokens : 0;

  const bool real = kv_head < args.cache.heads && first_row + lane.row < args.group;
  const Query q = load_query<T, kRotate>(
      args, query, int64_t{kv_head} * args.group + first_row + lane.row, real, lane,
      queries + warp / parts * T::kQueryBytes, warp % parts == 0);

  Raw<T> keys, values;
  const int64_t bytes = head_bytes<T>(args, range.slot, kv_head);
  int tile = warp % parts;
  if (tile < tiles) {  // on their way while the block prepares
    const int first = tile * T::kTokens;
    const TileRows rows = tile_rows<T>(args, bytes, range.slot, start + first, count - first);
    load_keys<T>(rows, lane, keys);
    load_values<T>(rows, lane, values);
  }
  stage_scales(args, range.slot, start, count, first_head, args.cache.pre_rope ? 1 : block_heads,
               scales);
  if constexpr (kRotate) stage_tables<T>(args, start, count, tables);
  Sums<T> sums{};
  sums.top = bits_float(kInfBits | 0x80000000u);
  const TokenScale* const own = scales + (args.cache.pre_rope ? 0 : warp / parts * kAttentionSplit);
  sync_block();

  for (; tile < tiles; tile += parts) {
    const int first = tile * T::kTokens, left = count - first, step = parts * T::kTokens;
    float s[T::kColumns][2];
    multiply_keys<T, kRotate>(q, keys, tables, first, smaller(left, T::kTokens) - 1, lane, s);
    TileRows next{};
    if (left > step) {
      next = tile_rows<T>(args, bytes, range.slot, start + first + step, left - step);
      load_keys<T>(next, lane, keys);
    }
    soften<T>(own + first, lane, s, sums);
    add_values<T>(values, s, sums);
    if (left > step) load_values<T>(next, lane, values);
  }
  merge<T>(args, sums, query, split, first_head, first_row, parts, lane, shared);
}

template <bool kPacked, int kDim, bool kRotate>
void launch(const AttentionArgs& args, void* stream) {
  using T = Tile<kPacked, kDim, kRotate>;
  const int64_t heads = attention_block_heads(args.cache.heads);
  const int64_t chunks = (int64_t{args.group} + kAttentionHeadRows - 1) / kAttentionHeadRows;
  const int64_t tables = args.cache.pre_rope ? 1 : heads;
  const int64_t bytes = T::kWorkBytes + heads * T::kQueryBytes +
                        tables * kAttentionSplit * int64_t{sizeof(TokenScale)};
  const dim3 grid(static_cast<unsigned>(args.p.n * args.splits),
                  static_cast<unsigned>((args.cache.heads + heads - 1) / heads * chunks));
  LLMQAT_LAUNCH_SHARED((attention_mma_kernel<kPacked, kDim, kRotate>), grid,
                       dim3(kAttentionThreads), static_cast<size_t>(bytes), stream, args,
                       static_cast<int>(heads));
}

}  // namespace

int launch_attention_mma(const AttentionArgs& args, void* stream) {
  const bool packed = args.cache.storage == LLMQAT_KV_INT4, rotate = args.cache.pre_rope;
  const bool wide = args.cache.head_dim == 128;
  using Launch = void (*)(const AttentionArgs&, void*);
  const Launch table[2][2][2] = {{{launch<false, 64, false>, launch<false, 64, true>},
                                  {launch<false, 128, false>, launch<false, 128, true>}},
                                 {{launch<true, 64, false>, launch<true, 64, true>},
                                  {launch<true, 128, false>, launch<true, 128, true>}}};
  table[packed][wide][rotate](args, stream);
  return cudaGetLastError();
}

}  // namespace llmqat
