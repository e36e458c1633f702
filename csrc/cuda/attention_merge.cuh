// From the sums of a warp of attention_mma.cu to the partial sums in memory: each for itself, or
// those of the warps that share a head added up by the block.
#pragma once

#include "cuda/attention_tile.cuh"

namespace llmqat {

// How a block of threads is made of warps: warp w has cached head w / parts of the block's, and
// part w % parts of its tokens.
struct AttentionBlock {
  int heads, parts;
  int work_bytes;  // of shared memory for the tables, then for the sums to be merged
};

// What blockIdx says.
struct BlockPlace {
  int query, piece;           // the piece of all pieces of all splits
  int first_head, first_row;  // cached head, query head of its group
};

LLMQAT_DEVICE BlockPlace block_place(const AttentionArgs& args, const AttentionBlock& block) {
  const int pieces = args.splits * args.pieces;
  const int chunks = (args.group + kAttentionHeadRows - 1) / kAttentionHeadRows;
  const int x = static_cast<int>(blockIdx.x), y = static_cast<int>(blockIdx.y);
  return {x / pieces, x % pieces, y / chunks * block.heads, y % chunks * kAttentionHeadRows};
}

// The sums of a warp so far: rows are columns of the head, columns are query heads.
template <class T>
struct Sums {
  float o[T::kSteps][4];  // biased
  // Of head lane.row; all but the maximum are the lane's own share.
  float top, total, weight;
};

// Shared memory of a merge. A lane has kDim / 8 neighbouring columns of two query heads; chunks and
// rows are padded so that 8 lanes of a 16-byte access never meet in a bank.
template <class T>
struct Merge {
  static constexpr int kChunk = T::kSteps * 2;  // columns
  static constexpr int kChunkRoom = kChunk + 4, kRow = 8 * kChunkRoom + 4;
  static constexpr int kRows = kAttentionWarps * kAttentionHeadRows;  // [warp, query head]
  static constexpr int kBytes = kRows * (kRow + 2) * 4;
  float *tops, *totals, *values;

  LLMQAT_DEVICE explicit Merge(unsigned char* shared)
      : tops(reinterpret_cast<float*>(shared) + kRows * kRow),
        totals(tops + kRows),
        values(reinterpret_cast<float*>(shared)) {}

  LLMQAT_DEVICE float* at(int row, int column) const {
    return values + row * kRow + column / kChunk * kChunkRoom + column % kChunk;
  }
};

// Adds the lanes' shares of total and weight up, and takes the bias and the powers of two of the
// codes from the sums.
template <class T>
LLMQAT_DEVICE void settle(Sums<T>& sums, Lane lane) {
  sums.total += shuffle_xor(sums.total, 1);
  sums.weight += shuffle_xor(sums.weight, 1);
  sums.total += shuffle_xor(sums.total, 2);
  sums.weight += shuffle_xor(sums.weight, 2);
  float bias[2];  // of query heads 2 * column and 2 * column + 1
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bias[i] = shuffle(sums.weight, 8 * lane.column + 4 * i) * (T::Form::bias(0) * kDenormal);
  }
#pragma unroll
  for (int m = 0; m < T::kSteps; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = i < 2 ? 1.0f : T::Form::kOddFactor;
      sums.o[m][i] = (sums.o[m][i] - bias[i % 2] * factor) * (1.0f / (kDenormal * factor));
    }
  }
}

// The lane's columns of its query head 2 * lane.column + i, 16 bytes at a time.
template <class T>
LLMQAT_DEVICE void store_columns(const Sums<T>& sums, int i, float* to) {
#pragma unroll
  for (int m = 0; m < T::kSteps; m += 2) {
    store_vec<float, 4>(to + 2 * m,
                        {sums.o[m][i], sums.o[m][2 + i], sums.o[m + 1][i], sums.o[m + 1][2 + i]});
  }
}

// The partial sums of one part, by its warp.
template <class T>
LLMQAT_DEVICE void store_piece(const AttentionArgs& args, const BlockPlace& place, int head,
                               const Sums<T>& sums, Lane lane) {
  const int64_t first = int64_t{head} * args.group + place.first_row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane.column + i;
    if (place.first_row + row >= args.group) continue;
    const Partial to = partial_of(args, place.query, first + row, place.piece);
    store_columns<T>(sums, i, to.sums + lane.row * Merge<T>::kChunk);
  }
  if (lane.column != 0 || place.first_row + lane.row >= args.group) return;
  const Partial to = partial_of(args, place.query, first + lane.row, place.piece);
  *to.top = sums.top;
  *to.total = sums.total;
}

// A lane's sums to where the block merges them, for the first `rows` query heads.
template <class T>
LLMQAT_DEVICE void stage_sums(const Merge<T>& merge, const Sums<T>& sums, int rows, Lane lane) {
  const int first = static_cast<int>(threadIdx.x / 32) * kAttentionHeadRows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane.column + i;
    if (row < rows) store_columns<T>(sums, i, merge.at(first + row, lane.row * Merge<T>::kChunk));
  }
  if (lane.column != 0) return;
  merge.tops[first + lane.row] = sums.top;
  merge.totals[first + lane.row] = sums.total;
}

// Adds the parts of each head in their order: 4 columns of a query head a thread.
template <class T>
LLMQAT_DEVICE void merge_parts(const AttentionArgs& args, const BlockPlace& place,
                               const AttentionBlock& block, const Merge<T>& merge, int rows) {
  constexpr int kItems = T::kSteps * 4, kStep = kAttentionThreads / kItems;
  const int thread = static_cast<int>(threadIdx.x), column = thread % kItems * 4;
  for (int i = thread / kItems; i < block.heads * rows; i += kStep) {
    const int own = i / rows, row = i % rows, head = place.first_head + own;
    if (head >= args.cache.heads) return;
    const int at = own * block.parts * kAttentionHeadRows + row;
    float top = merge.tops[at];
    for (int p = 1; p < block.parts; ++p) {
      top = fmaxf(top, merge.tops[at + p * kAttentionHeadRows]);
    }
    Vec<float, 4> sum{};
    float total = 0.0f;
    for (int p = 0; p < block.parts; ++p) {
      const int from = at + p * kAttentionHeadRows;
      const float share = part_share(merge.tops[from], top);
      const auto values = load_vec<float, 4>(merge.at(from, column));
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.v[k] = add_part(sum.v[k], values.v[k], share);
      total = add_part(total, merge.totals[from], share);
    }
    const int64_t query_head = int64_t{head} * args.group + place.first_row + row;
    const Partial to = partial_of(args, place.query, query_head, place.piece);
    store_vec<float, 4>(to.sums + column, sum);
    if (column != 0) continue;
    *to.top = mul_rn(top, kLn2);
    *to.total = total;
  }
}

// Every warp's sums to memory.
template <class T>
LLMQAT_DEVICE void finish(const AttentionArgs& args, const AttentionBlock& block, Sums<T>& sums,
                          Lane lane, unsigned char* shared) {
  const BlockPlace place = block_place(args, block);
  settle<T>(sums, lane);
  if (args.pieces > 1) {
    const int own = static_cast<int>(threadIdx.x / 32), head = place.first_head + own;
    if (own < block.heads && head < args.cache.heads) {
      store_piece<T>(args, place, head, sums, lane);
    }
    return;
  }
  const Merge<T> merge(shared);
  const int rows = smaller(args.group - place.first_row, kAttentionHeadRows);
  sync_block();  // the tables are done with
  stage_sums<T>(merge, sums, rows, lane);
  sync_block();
  merge_parts<T>(args, place, block, merge, rows);
}

}  // namespace llmqat
