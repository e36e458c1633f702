"""Bugs of the quantizer and of the linears."""

from tests.emulator.planted.bug import Bug

QUANTIZE = ("test_quantize.py", "2-2048-dtype0")
LARGEST = ("test_quantize.py", "largest_value")
SPECIAL = ("test_quantize.py", "special or unaligned")
LINEAR = ("test_quantized_linear.py", "equals_spec and 70-32-128 or cut_gives and (forward or lag)")
REPACK = ("test_repack_weight.py", "repack_is and 31-130")
FLOAT = ("test_float_linear.py", "small_integers or ratio_rule and 1-40-2100")
GROUPS = ("test_int4_linear.py", "equal_spec and 80-8-65-1280-64-4 or test_schedules and 80-lag")
GROUPS_90 = ("test_int4_linear.py", "equal_spec and 90-8-65-1280-64-4")
PLAIN = ("test_int4_linear.py", "any_layout and 80-3")
REDUCE = "csrc/include/llmqat/reduce.cuh"
PIPELINE = "csrc/cuda/linear_pipeline.cuh"
EPILOGUE = "csrc/cuda/linear_epilogue.cuh"
INTEGER_LINEAR = "csrc/cuda/quantized_linear.cu"
FLOAT_LINEAR = "csrc/cuda/float_linear.cu"
INT4_LINEAR = "csrc/cuda/int4_linear.cu"
INT4_FRAGMENTS = "csrc/cuda/int4_fragments.cuh"

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
)
