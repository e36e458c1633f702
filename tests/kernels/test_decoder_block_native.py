"""decoder_blocks: the bits of the public operators composed, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.spec.quantize import quantize_integer_groups
from llmqat_kernels.testing import assert_same_bits, generator
from tests.kernels.kv_cases import empty_cache, tables

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)

OPS = torch.ops.llmqat_cpu
TOKENS, SLOTS, SCALING = 24, 3, 0.3


@dataclass
class Linear:
    """A repacked weight [n, k] with its scale and bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    n: int
    bits: int
    group_size: int
    multiplier: Tensor | None = None

    def __call__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if self.multiplier is not None:
            weight = self.weight, self.multiplier, self.scale, self.bias, self.group_size
            return OPS.integer_group_matmul(codes, scale, *weight, dtype)
        return OPS.repacked_matmul(
            codes,
            scale,
            self.weight,
            self.scale,
            self.bias,
            self.n,
            self.bits,
            self.group_size,
            dtype,
        )


@dataclass
class Case:
    """Two random blocks and their caches."""

    w_bits: int = 4
    a_bits: int = 8
    kv_bits: int = 8
    mode: str = "paper"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 36
    width: int = 44  # of the MLP
    groups: bool = False
    integer_scales: bool = False  # of the groups
    bias: bool = False
    dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    blocks: list[tuple[Tensor, Tensor, list[Linear]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = generator(11)
        attention = self.heads * self.head_dim
        shapes = [
            (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            (self.hidden, attention),
            (2 * self.width, self.hidden),
            (self.hidden, self.width),
        ]
        for _ in range(2):
            norms = torch.randn(2, self.hidden, generator=random).to(self.norm_dtype)
            linears = [self._linear(n, k, random) for n, k in shapes]
            self.blocks.append((norms[0], norms[1], linears))

    @property
    def pre_rope(self) -> bool:
        return self.mode == "paper" and self.kv_bits != 16

    def _linear(self, n: int, k: int, random: torch.Generator) -> Linear:
        group_size = k // 2 if self.groups else -1
        weight = torch.randn(n, k, generator=random) / k**0.5
        multiplier = None
        if self.integer_scales:
            codes, multiplier, scale = quantize_integer_groups(weight, self.w_bits, group_size)
        else:
            codes, scale = OPS.quantize(weight, self.w_bits, group_size, False)
        packed = OPS.pack_int4(codes) if self.w_bits == 4 else codes
        bias = torch.randn(n, generator=random).to(self.norm_dtype) if self.bias else None
        layout = OPS.repack_weight(packed, self.w_bits)
        return Linear(layout, scale, bias, n, self.w_bits, group_size, multiplier)

    def caches(self) -> list[tuple[Tensor, ...]]:
        shape = (SLOTS, self.kv_heads, TOKENS, self.head_dim, self.kv_bits, self.mode)
        return [empty_cache(*shape, float_dtype=self.dtype) for _ in self.blocks]

    def composed(self, x: Tensor, caches, slots: Tensor, positions: Tensor) -> Tensor:
        """The public operators, one by one."""
        cos, sin = tables(TOKENS, self.head_dim)
        stream, delta = x, None
        for (first, second, (qkv, o, gate_up, down)), cache in zip(
            self.blocks, caches, strict=True
        ):
            codes, scale, total = OPS.rms_norm_quantize(stream, first, 1e-5, self.a_bits, delta)
            stream = stream if delta is None else total
            parts = qkv(codes, scale, x.dtype).view(len(x), -1, self.head_dim)
            q, k, v = parts.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), 1)
            where = (slots, positions, self.kv_bits, self.pre_rope)
            OPS.rope_quantize_append(k, v, cos, sin, *cache, *where)
            mixed = OPS.attention_decode(
                OPS.rope(q, cos, sin, positions),
                *cache,
                cos,
                sin,
                slots,
                positions + 1,
                SCALING,
                self.kv_bits,
                self.pre_rope,
            )
            codes, scale = OPS.quantize(mixed.view(len(x), -1), self.a_bits)
            delta = o(codes, scale, x.dtype)
            codes, scale, stream = OPS.rms_norm_quantize(stream, second, 1e-6, self.a_bits, delta)
            gate, up = gate_up(codes, scale, x.dtype).split(self.width, 1)
            delta = down(*OPS.silu_mul_quantize(gate, up, self.a_bits), x.dtype)
        return stream + delta

    def arguments(self, x: Tensor, caches, slots: Tensor, positions: Tensor) -> dict:
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        multipliers: list[Tensor | None] = []
        for first, second, linears in self.blocks:
            weights += [first, second]
            for linear in linears:
                weights += [linear.weight, linear.scale]
                biases.append(linear.bias)
                multipliers.append(linear.multiplier)
        cos, sin = tables(TOKENS, self.head_dim)
        return {
            "hidden": x,
            "weights": weights,
            "biases": biases,
            "multipliers": multipliers,
            "caches": [tensor for cache in caches for tensor in cache],
            "eps": [1e-5, 1e-6] * len(self.blocks),
            "bits": [self.a_bits] * len(self.blocks),
            "cos": cos,
            "sin": sin,
            "slots": slots,
            "positions": positions,
            "heads": self.heads,
            "scaling": SCALING,
            "kv_bits": self.kv_bits,
            "pre_rope": self.pre_rope,
        }


# One row; rows of several slots; a prefill of one slot; more rows than a matmul tile.
STEPS = [
    ([1], [0]),
    ([1, 2, 0], [1, 0, 0]),
    ([2] * 5, [1, 2, 3, 4, 5]),
    ([0] * 16 + [1], [*range(1, 17), 2]),
]


def check(case: Case) -> None:
    """Every step in turn, on two copies of one cache."""
    ours, theirs = case.caches(), case.caches()
    for seed, (slots, positions) in enumerate(STEPS):
        x = torch.randn(len(slots), case.hidden, generator=generator(seed)).to(case.dtype)
        where = (torch.tensor(slots), torch.tensor(positions))
        expected = case.composed(x.clone(), theirs, *where)
        OPS.decoder_blocks(**case.arguments(x, ours, *where))
        assert_same_bits(x, expected)
        for a, b in zip(ours, theirs, strict=True):
            for got, want in zip(a, b, strict=True):
                assert_same_bits(got, want)


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("w_bits", [4, 8])
def test_bits_of_the_composition(isa, w_bits, kv_bits, mode):
    check(Case(w_bits=w_bits, kv_bits=kv_bits, mode=mode))


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        {"groups": True},
        {"groups": True, "bias": True, "w_bits": 8, "kv_bits": 4},
        {"groups": True, "integer_scales": True},
        {"groups": True, "integer_scales": True, "w_bits": 2, "bias": True},
        {"kv_heads": 4},
        {"kv_heads": 1, "heads": 5},
        {"a_bits": 6, "w_bits": 3},
        {"head_dim": 10, "hidden": 37, "width": 33, "w_bits": 8},
        {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "width": 1536},
    ],
    ids=str,
)
def test_shapes(isa, fields):
    check(Case(**fields))


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows(isa, dtype, kv_bits, mode):
    check(Case(dtype=dtype, norm_dtype=dtype, kv_bits=kv_bits, mode=mode, bias=True))


def test_threads_do_not_change_bits():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(Case(heads=9, kv_heads=3, head_dim=64, hidden=576, width=1536))
    finally:
        torch.set_num_threads(threads)


def test_no_rows_and_no_blocks():
    case = Case()
    none = torch.zeros(0, dtype=torch.int64)
    OPS.decoder_blocks(**case.arguments(torch.empty(0, case.hidden), case.caches(), none, none))
    x = torch.randn(1, case.hidden)
    zero = torch.zeros(1, dtype=torch.int64)
    lists = ("weights", "biases", "multipliers", "caches", "eps", "bits")
    empty: dict[str, list] = {name: [] for name in lists}
    before = x.clone()
    OPS.decoder_blocks(**case.arguments(x, case.caches(), zero, zero) | empty)
    assert_same_bits(x, before)


def replaced(index: int, tensor: Tensor):
    """A list argument with another tensor at ``index``."""
    return lambda old: [*old[:index], tensor, *old[index + 1 :]]


SMALL = Case()
QKV = SMALL.blocks[0][2][0]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("hidden", lambda x: x.double(), "hidden: expected float32"),
        ("hidden", lambda x: x[:, :-4].contiguous(), "expected size 32"),
        ("hidden", lambda x: torch.stack([x, x], -1)[..., 0], "hidden: expected a contiguous"),
        ("hidden", lambda x: x[0], "hidden: expected 2 dimensions"),
        ("weights", lambda old: old[:-1], "weights: expected 20 entries"),
        ("biases", lambda old: old[:-1], "biases: expected 8 entries"),
        ("multipliers", lambda old: old[:-1], "multipliers: expected 8 entries"),
        ("multipliers", replaced(0, torch.ones(128, 5, dtype=torch.uint8)), "5 groups do not"),
        ("multipliers", replaced(0, torch.ones(127, 2, dtype=torch.uint8)), "expected size 128"),
        ("multipliers", replaced(0, torch.ones(128, 2)), "w_multiplier: expected uint8"),
        ("caches", lambda old: old[:-1], "caches: expected 8 entries"),
        ("eps", lambda old: old[:-1], "eps: expected 4 entries"),
        ("bits", lambda old: [8, 9], "bits: expected 2 to 8, got 9"),
        ("weights", replaced(0, torch.ones(3)), "input_norm: expected size 36"),
        ("weights", replaced(2, torch.zeros(640, dtype=torch.uint8)), "w: not a weight made by"),
        ("weights", replaced(2, QKV.weight[:-1]), "w: not a weight made by"),
        ("weights", replaced(4, QKV.weight), "n: the repacked weight has 128 rows, got 36"),
        ("weights", replaced(2, OPS.repack_weight(torch.ones(128, 36), 16)), "w: repacked for an"),
        ("weights", replaced(3, QKV.scale[:-1]), "w_scale: expected size 128"),
        ("weights", replaced(3, QKV.scale.double()), "w_scale: expected float32"),
        ("biases", replaced(0, torch.ones(3)), "bias: expected size 128"),
        ("caches", replaced(0, torch.zeros(1, dtype=torch.int8)), "k_codes: expected 4 dim"),
        ("caches", replaced(1, torch.zeros(2, 2)), "k_scale: expected size 3"),
        ("cos", lambda old: old[:2], "positions: 2 at index 0 is outside 0..1"),
        ("sin", lambda old: old[:2], "sin: expected at least 24 rows"),
        ("cos", lambda old: old[:, :4], "sin: expected size 4"),
        ("slots", lambda old: old + 2, "slots: 3 at index 0 is outside 0..2"),
        ("slots", lambda old: old.int(), "slots: expected int64"),
        ("positions", lambda old: old - 3, "positions: -1 at index 0"),
        ("positions", lambda old: old + 22, "positions: 24 at index 0 is outside 0..23"),
        ("positions", lambda old: old.repeat(2), "positions: expected size 1"),
        ("heads", lambda old: 3, "heads: 3 is not a multiple"),
        ("heads", lambda old: 0, "heads: expected a positive number"),
        ("kv_bits", lambda old: 16, "k_codes: expected float32"),
    ],
)
def test_bad_arguments(name, change, words):
    x = torch.randn(1, SMALL.hidden)
    where = (torch.tensor([1]), torch.tensor([2]))
    arguments = SMALL.arguments(x, SMALL.caches(), *where)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=words):
        OPS.decoder_blocks(**arguments)
