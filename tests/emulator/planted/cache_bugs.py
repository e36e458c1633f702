"""Bugs of what writes and reads the KV cache, and of what several kernels share."""

from tests.emulator.planted.bug import Bug

STRIDES = ("test_rope_quantize_append.py", "strides_change and 4 and dtype1")
TURN = "touch_memory and "
ON_THE_WAY = ("test_rope_quantize_append.py", "queries_on_the_way and 8 and dtype1")
QUERIES = ("test_attention_decode.py", "strides_of_the_queries and 8 and paper")
APPEND = ("test_rope_quantize_append.py", "every_schedule and (forward or lagging) or outside")
ATTENTION = (
    "test_attention_decode.py",
    "plain_torch and 64-8 and dtype1 or no_schedule and lagging",
)
PLANS = ("test_attention_decode.py", "every_plan")
BATCH = ("test_attention_decode.py", "beyond_change")
OUTPUT = ("test_attention_decode.py", "output_row")
WIDE = ("test_wide_offsets.py", "far_page")
INTEGER_LINEAR = "csrc/cuda/quantized_linear.cu"
ROPE_APPEND = "csrc/cuda/rope_quantize_append.cu"
ATTENTION_MMA = "csrc/cuda/attention_mma.cu"
ATTENTION_MERGE = "csrc/cuda/attention_merge.cuh"
ATTENTION_TILE = "csrc/cuda/attention_tile.cuh"
ATTENTION_SCALAR = "csrc/cuda/attention_scalar.cu"
ATTENTION_DECODE = "csrc/cuda/attention_decode.cu"

BUGS = (
    # ---- KV cache ----
    Bug(
        "append: wrong sign of the rotation",
        ROPE_APPEND,
        "first ? -other : other",
        "first ? other : -other",
        APPEND,
    ),
    Bug(
        "append: a position one past the end is written",
        ROPE_APPEND,
        "position < slot_capacity(args.cache)",
        "position <= slot_capacity(args.cache)",
        APPEND,
    ),
    Bug(
        "append: heads of a token taken for one row",
        ROPE_APPEND,
        "if (x.head == dim) return column;",
        "if (x.head >= dim) return column;",
        STRIDES,
    ),
    Bug(
        "append: tokens taken for contiguous",
        ROPE_APPEND,
        "token * x.token + head * x.head",
        "token * x.head + head * x.head",
        STRIDES,
    ),
    Bug(
        "append: wide loads at heads that are not aligned",
        ROPE_APPEND,
        " && x.token % kN == 0 && x.head % kN == 0",
        "",
        STRIDES,
    ),
    Bug(
        "append: queries of the next head",
        ROPE_APPEND,
        "(blockIdx.y - 2) * (blockDim.x / 32) + threadIdx.x / 32",
        "(blockIdx.y - 2) * (blockDim.x / 32) + threadIdx.x / 32 + 1",
        ON_THE_WAY,
    ),
    Bug(
        "append: queries of the keys' blocks",
        ROPE_APPEND,
        "(blockIdx.y - 2) * rows + row",
        "(blockIdx.y - 1) * rows + row",
        ON_THE_WAY,
    ),
    Bug(
        "append: a query past the tables reads them",
        ROPE_APPEND,
        "position >= 0 && position < args.tables.rows",
        "position >= 0",
        ("test_rope_quantize_append.py", "queries_of_places_outside"),
    ),
    Bug(
        "attention: tickets as the last launch left them",
        "csrc/cuda/attention_args.cuh",
        "args.p.tickets[query] = 0;",
        "args.p.tickets[query] += 0;",
        OUTPUT,
    ),
    Bug(
        "attention: no block that clears the tickets of an empty cache",
        ATTENTION_DECODE,
        "std::max<int64_t>(1, attention_splits(problem->max_length))",
        "attention_splits(problem->max_length)",
        ("test_attention_decode.py", "largest_length_of_zero"),
    ),
    Bug(
        "attention: queries taken for contiguous",
        "csrc/cuda/attention_args.cuh",
        "query * args.p.q.token",
        "query * args.p.heads * args.cache.head_dim",
        QUERIES,
    ),
    Bug(
        "quantize: rows taken for contiguous",
        "csrc/cuda/quantize.cu",
        "x += r * row_stride;",
        "x += r * columns;",
        ("test_quantize.py", "rows_apart and 64-96"),
    ),
    # ---- launches that overlap ----
    Bug(
        "quantize: never waits for the launch before",
        "csrc/cuda/quantize.cu",
        "take_turn();",
        "griddepcontrol_launch_dependents();",
        ("test_quantize.py", "unaligned"),
    ),
    Bug(
        "append: places read before its turn",
        ROPE_APPEND,
        "  take_turn();\n  const int64_t token = blockIdx.x;\n",
        "  const int64_t token = blockIdx.x;\n  append_place(args, token);\n  take_turn();\n",
        ("test_overlap.py", TURN + "append_queries"),
    ),
    Bug(
        "linears: weights read before their turn",
        INTEGER_LINEAR,
        "  feed.prefetch_and_wait();\n",
        "  feed.issue(0);\n  feed.prefetch_and_wait();\n",
        ("test_overlap.py", TURN + "repacked_matmul_add"),
    ),
    Bug(
        "attention: ranges of the queries before their turn",
        ATTENTION_DECODE,
        "  take_turn();\n",
        "  query_range(args, blockIdx.x);\n  take_turn();\n",
        ("test_overlap.py", TURN + "attention_decode_quantize"),
    ),
    Bug(
        "append: 32-bit offset of a row",
        ROPE_APPEND,
        "static_cast<int8_t*>(codes) + row * dim + column",
        "static_cast<int8_t*>(codes) + static_cast<int>(row) * static_cast<int>(dim) + column",
        WIDE,
    ),
    Bug(
        "attention: 32-bit offset of a page",
        ATTENTION_TILE,
        "bytes += block * args.block_bytes + at.offset",
        "bytes += static_cast<int>(block) * static_cast<int>(args.block_bytes) + at.offset",
        WIDE,
    ),
    Bug(
        "attention: no barrier before the scales are read",
        ATTENTION_MMA,
        "bits_float(kInfBits | 0x80000000u);\n  sync_block();\n",
        "bits_float(kInfBits | 0x80000000u);\n",
        ATTENTION,
    ),
    Bug(
        "attention: sums merged over tables that are still read",
        ATTENTION_MERGE,
        "  sync_block();  // the tables are done with\n",
        "",
        ATTENTION,
    ),
    Bug(
        "attention: parts of a head added in another order",
        ATTENTION_MERGE,
        "for (int p = 0; p < block.parts; ++p) {",
        "for (int p = block.parts - 1; p >= 0; --p) {",
        ("test_attention_decode.py", "in_their_order"),
    ),
    Bug(
        "attention: a part takes the tiles of another",
        ATTENTION_TILE,
        "* slice.pieces + slice.piece) *",
        "* slice.pieces + slice.pieces - 1 - slice.piece) *",
        PLANS,
    ),
    Bug(
        "attention: the next tile's codes in this tile's registers",
        ATTENTION_MMA,
        "T::kDeep ? other_keys : keys;",
        "keys;",
        PLANS,
    ),
    Bug(
        "attention: the slot of another query",
        ATTENTION_MMA,
        "head_bytes<T>(args, range.slot, kv_head)",
        "head_bytes<T>(args, place.query, kv_head)",
        BATCH,
    ),
    Bug(
        "attention: one token too many",
        ATTENTION_TILE,
        "bool counts = slice_token(slice, place) < slice.count;",
        "bool counts = slice_token(slice, place) <= slice.count;",
        ("test_attention_decode.py", "more_than_one_fragment"),
    ),
    Bug(
        "attention: scale of the wrong token",
        ATTENTION_MMA,
        "scales[8 * c + 2 * lane.column + i].weight",
        "scales[8 * c + 2 * lane.column + 1 - i].weight",
        ATTENTION,
    ),
    Bug(
        "attention: wrong query head of the group",
        ATTENTION_MMA,
        "args, place.query, int64_t{kv_head} * args.group",
        "args, place.query, int64_t{kv_head}",
        ATTENTION,
    ),
    Bug(
        "attention: sums rescaled by the factor of another head",
        ATTENTION_MMA,
        "shuffle(shrink, 8 * lane.column + 4)",
        "shuffle(shrink, 8 * lane.column)",
        ATTENTION,
    ),
    Bug(
        "scalar attention: wrong cached head of a group",
        ATTENTION_SCALAR,
        "kv_head = head / args.group;",
        "kv_head = head % static_cast<int>(args.cache.heads);",
        ("test_attention_decode.py", "plain_torch and 64-8 and dtype0"),
    ),
    Bug(
        "combine: last head arrives one early",
        ATTENTION_DECODE,
        "*work.arrived + 1 != static_cast<uint32_t>(args.p.heads)",
        "*work.arrived + 2 != static_cast<uint32_t>(args.p.heads)",
        OUTPUT,
    ),
    Bug(
        "combine: a piece without tokens is read",
        ATTENTION_DECODE,
        "piece * kAttentionTileTokens < length;",
        "piece * kAttentionTileTokens <= length;",
        ("test_attention_decode.py", "around_a_page"),
    ),
    Bug(
        "combine: no barrier before the groups are added",
        ATTENTION_DECODE,
        "      shared.group_total[g] = total;\n    }\n    sync_block();\n",
        "      shared.group_total[g] = total;\n    }\n",
        ("test_attention_decode.py", "many_splits"),
    ),
    Bug(
        "combine: groups taken by the wrong lanes",
        ATTENTION_DECODE,
        "for (int g = lane; g < groups; g += lanes) {",
        "for (int g = lane; g < groups; g += lanes + 1) {",
        ("test_attention_decode.py", "more_splits"),
    ),
)
