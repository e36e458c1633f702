"""The bugs: each a small change of a kernel that its tests in the emulator must notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """``text``, which ``file`` holds exactly once, becomes ``replacement``.

    ``tests`` are the short check that must fail then: a file of ``tests/emulator`` and what to
    select in it (pytest's -k).
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, str]


QUANTIZE = ("test_quantize.py", "2-2048-dtype0")
LARGEST = ("test_quantize.py", "largest_value")
SPECIAL = ("test_quantize.py", "special or unaligned")
LINEAR = ("test_quantized_linear.py", "equals_spec and 70-32-128 or cut_gives and (forward or lag)")
REPACK = ("test_repack_weight.py", "repack_is and 31-130")
FLOAT = ("test_float_linear.py", "small_integers or ratio_rule and 1-40-2100")
GROUPS = ("test_int4_linear.py", "equal_spec and 80-8-65-1280-64-4 or test_schedules and 80-lag")
GROUPS_90 = ("test_int4_linear.py", "equal_spec and 90-8-65-1280-64-4")
PLAIN = ("test_int4_linear.py", "any_layout and 80-3")
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

REDUCE = "csrc/include/llmqat/reduce.cuh"
PIPELINE = "csrc/cuda/linear_pipeline.cuh"
EPILOGUE = "csrc/cuda/linear_epilogue.cuh"
INTEGER_LINEAR = "csrc/cuda/quantized_linear.cu"
FLOAT_LINEAR = "csrc/cuda/float_linear.cu"
INT4_LINEAR = "csrc/cuda/int4_linear.cu"
INT4_FRAGMENTS = "csrc/cuda/int4_fragments.cuh"
ROPE_APPEND = "csrc/cuda/rope_quantize_append.cu"
ATTENTION_MMA = "csrc/cuda/attention_mma.cu"
ATTENTION_MERGE = "csrc/cuda/attention_merge.cuh"
ATTENTION_TILE = "csrc/cuda/attention_tile.cuh"
ATTENTION_SCALAR = "csrc/cuda/attention_scalar.cu"
ATTENTION_DECODE = "csrc/cuda/attention_decode.cu"

BUGS = (
    # ---- quantize ----
    Bug("reduction without its barrier", REDUCE, "  sync_block();\n", "", QUANTIZE),
    Bug(
        "last warp left out of a reduction",
        REDUCE,
        "lane < blockDim.x / kWarp ?",
        "lane + 1 < blockDim.x / kWarp ?",
        LARGEST,
    ),
    Bug(
        "slots of absent warps read",
        REDUCE,
        "lane < blockDim.x / kWarp ? warp_max[lane] : 0u",
        "warp_max[lane]",
        QUANTIZE,
    ),
    Bug(
        "last chunk of a row not stored",
        "csrc/cuda/quantize.cu",
        "if (c < chunks) store_vec(",
        "if (c + 1 < chunks) store_vec(",
        SPECIAL,
    ),
    Bug(
        "one row too many",
        "csrc/cuda/quantize.cu",
        "if (r >= rows) return;",
        "if (r > rows) return;",
        ("test_quantize.py", "5-7-dtype0-forward"),
    ),
    # ---- linears with integer activations ----
    Bug(
        "integer linear: wait for one copy group too few",
        INTEGER_LINEAR,
        "cp_async_wait<kBuffers - 2>();",
        "cp_async_wait<kBuffers - 1>();",
        LINEAR,
    ),
    Bug(
        "integer linear: no barrier after the wait",
        INTEGER_LINEAR,
        "sync_block();  // this stage is there for all; the one before it",
        "//",
        LINEAR,
    ),
    Bug(
        "integer linear: no barrier before the shared sums are read",
        INTEGER_LINEAR,
        "      sync_block();\n      if (leads) sums.collect",
        "      if (leads) sums.collect",
        LINEAR,
    ),
    Bug(
        "integer linear: nibbles swapped",
        INTEGER_LINEAR,
        "low[i] = w.v[i] & 0x0F0F0F0Fu",
        "low[i] = w.v[i] >> 4 & 0x0F0F0F0Fu",
        LINEAR,
    ),
    Bug(
        "integer linear: epilogue without -8 * sum",
        INTEGER_LINEAR,
        "acc[1][j][i] -= 8 * exchange.sums[way][j * 8 + lane % 4 * 2 + i % 2];",
        "",
        LINEAR,
    ),
    Bug(
        "integer linear: wrong shuffle lane",
        INTEGER_LINEAR,
        "shuffle_xor(total, 2)",
        "shuffle_xor(total, 4)",
        LINEAR,
    ),
    Bug(
        "integer linear: fragment registers swapped",
        INTEGER_LINEAR,
        "columns[2] = {a[j].v[2 * odd], a[j].v[2 * odd + 1]};",
        "columns[2] = {a[j].v[2 * odd + 1], a[j].v[2 * odd]};",
        LINEAR,
    ),
    Bug(
        "integer linear: workspace not left as zeros",
        INTEGER_LINEAR,
        "        values[v * kLinearThreads] = 0;\n",
        "",
        LINEAR,
    ),
    Bug(
        "linears: ticket not taken back",
        PIPELINE,
        "    if (last) *ticket = 0;\n",
        "",
        LINEAR,
    ),
    Bug(
        "linears: last arriver one block early",
        PIPELINE,
        "atomic_add_u32(ticket, mine) + mine == all",
        "atomic_add_u32(ticket, mine) + mine + 1 >= all",
        LINEAR,
    ),
    Bug(
        "linears: a row of activations too many",
        PIPELINE,
        "row_ + i * kRows < args_.rows ?",
        "row_ + i * kRows <= args_.rows ?",
        ("test_quantized_linear.py", "reads_nothing_beyond"),
    ),
    Bug(
        "linears: weights of k that is not there",
        PIPELINE,
        "const bool there = blocks_left_ > 0;",
        "const bool there = blocks_left_ > -3;",
        ("test_quantized_linear.py", "reads_nothing_beyond"),
    ),
    Bug(
        "integer linear: sums of a warp left out",
        INTEGER_LINEAR,
        "for (int way = 1; way < kWays; ++way) {",
        "for (int way = 2; way < kWays; ++way) {",
        LINEAR,
    ),
    Bug(
        "integer linear: copies stay in the group that was cut",
        INTEGER_LINEAR,
        "if (--ahead.count == 0 && ahead.next(args)) feed.seek(ahead.group, ahead.stage);",
        "if (--ahead.count == 0) ahead.next(args);",
        LINEAR,
    ),
    Bug(
        "integer linear: the whole groups of the next block",
        INTEGER_LINEAR,
        "(static_cast<int>(blockIdx.x) + 1) * args.whole - whole_;",
        "(static_cast<int>(blockIdx.x) + 1) * args.whole;",
        LINEAR,
    ),
    Bug(
        "linears: scale of the wrong channel",
        EPILOGUE,
        "const float sw = channels.scale[part][i];",
        "const float sw = channels.scale[part][0];",
        LINEAR,
    ),
    Bug(
        "linears: one token too many",
        EPILOGUE,
        "if (token >= args.p.m) continue;",
        "if (token > args.p.m) continue;",
        LINEAR,
    ),
    # ---- linears with float activations ----
    Bug(
        "float linear: wait for one copy group too few",
        FLOAT_LINEAR,
        "cp_async_wait<kBuffers - 2>();",
        "cp_async_wait<kBuffers - 1>();",
        FLOAT,
    ),
    Bug(
        "float linear: offset of the low code forgotten",
        FLOAT_LINEAR,
        "0xE408E408u",
        "0xE400E400u",
        FLOAT,
    ),
    Bug(
        "float linear: wrong byte order of the codes",
        FLOAT_LINEAR,
        "byte_permute(bytes, 0, 0x3120)",
        "byte_permute(bytes, 0, 0x3210)",
        FLOAT,
    ),
    Bug(
        "float linear: parts not left as zeros",
        FLOAT_LINEAR,
        "        *part = 0.0f;\n",
        "",
        FLOAT,
    ),
    Bug(
        "repack: packed code at the wrong parity",
        "csrc/cuda/repack_weight.cu",
        "at.column % 2 == 0 ?",
        "at.column % 2 != 0 ?",
        REPACK,
    ),
    # ---- 4-bit weights in groups ----
    Bug(
        "group linear: wait for one copy group too few",
        INT4_LINEAR,
        "cp_async_wait<T::kStages - 2>();",
        "cp_async_wait<T::kStages - 1>();",
        GROUPS,
    ),
    Bug(
        "group linear: no barrier after the wait",
        INT4_LINEAR,
        "sync_block();  // stage s is there for all, and nobody reads",
        "//",
        GROUPS,
    ),
    Bug(
        "group linear: no barrier before the stages are reused",
        INT4_LINEAR,
        "  sync_block();  // the stages are free\n",
        "",
        GROUPS,
    ),
    Bug(
        "group linear: last segment has no multiplier",
        INT4_LINEAR,
        "s < segments; s += kWarpLanes",
        "s + 1 < segments; s += kWarpLanes",
        GROUPS,
    ),
    Bug(
        "group linear: ldmatrix rows of the wrong lanes",
        INT4_FRAGMENTS,
        "packed_place(row + lane % 16, 2 * step + lane / 16)",
        "packed_place(row + lane % 8, 2 * step + lane / 8 % 2)",
        GROUPS,
    ),
    Bug(
        "group linear, sm_90: even and odd columns from the same nibbles",
        INT4_FRAGMENTS,
        "planes[0][i] = (raw[i] << 4) & kHighNibbles;",
        "planes[0][i] = raw[i] & kHighNibbles;",
        GROUPS_90,
    ),
    Bug(
        "group linear: plain kernel uses the wrong group",
        INT4_LINEAR,
        "multiplier[column / group_size]",
        "multiplier[(column + 1) / group_size]",
        PLAIN,
    ),
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
        "  weights.prefetch_and_wait(lane);\n",
        "  weights.load(0);\n  weights.prefetch_and_wait(lane);\n",
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
