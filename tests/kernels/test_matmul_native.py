"""The C++ matrix kernels against exact arithmetic, on every instruction set of this machine.

Expected values are computed here: fp64 products of integers (exact below 2^53) and the epilogue of
spec 7 in torch fp32, one operation at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)

OPS = torch.ops.llmqat_cpu
ODD_K = (1, 2, 3, 15, 17, 31, 33, 63, 65, 127, 129)
ODD_MN = (0, 1, 2, 3, 7, 16, 17, 65)
WORST_K = (1, 31, 33, 1040, 1041, 4096, 11008, 28672)


def codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return torch.randint(
        -limit, limit + 1, (rows, columns), generator=generator(seed), dtype=torch.int8
    )


def scales(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)) * 0.1 + 1e-3


def pack(w: Tensor) -> Tensor:
    """Spec 8, written out again."""
    even, odd = w[:, ::2], w[:, 1::2]
    if w.shape[1] % 2:
        odd = torch.cat([odd, w.new_zeros((w.shape[0], 1))], dim=1)
    return ((even & 15) | ((odd & 15) << 4)).view(torch.uint8)


def exact_acc(a: Tensor, w: Tensor) -> Tensor:
    return (a.double() @ w.double().T).to(torch.int64)


def expected_output(
    a: Tensor,
    sx: Tensor,
    w: Tensor,
    sw: Tensor,
    bias: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    if group == -1:
        y = exact_acc(a, w).float() * (sx[:, None] * sw[None, :])
    else:
        y = None
        for g in range(a.shape[1] // group):
            cut = slice(g * group, (g + 1) * group)
            term = exact_acc(a[:, cut], w[:, cut]).float() * (sx[:, None] * sw[:, g][None, :])
            y = term if y is None else y + term
        if y is None:
            y = torch.zeros(a.shape[0], w.shape[0])
    return (y if bias is None else y + bias.float()).to(dtype)


def weight_forms(w: Tensor, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Every stored form of the codes: rows, packed rows, repacked from either."""
    yield "codes", w
    yield "repacked", OPS.repack_weight(w, bits)
    if bits == 4:
        yield "packed", pack(w)
        yield "repacked packed", OPS.repack_weight(pack(w), 4)


def product(
    form: str,
    a: Tensor,
    sx: Tensor,
    weight: Tensor,
    sw: Tensor,
    bias: Tensor | None,
    n: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    if form.startswith("repacked"):
        return OPS.repacked_matmul(a, sx, weight, sw, bias, n, bits, group, dtype)
    return OPS.quantized_matmul(a, sx, weight, sw, bias, bits, group, dtype)


# ---- exact accumulators --------------------------------------------------------------------------


@pytest.mark.parametrize("k", ODD_K)
def test_int_matmul_odd_shapes(isa: str, k: int) -> None:
    for n in ODD_MN:
        for m in ODD_MN:
            a, w = codes(m, k, 8, k + m), codes(n, k, 8, k + n + 1)
            assert_same_bits(OPS.int_matmul(a, w, 8), exact_acc(a, w).int(), f"int8 {m}x{n}x{k}")
            w = codes(n, k, 4, k + n + 2)
            for weight in (w, pack(w)):
                assert_same_bits(
                    OPS.int_matmul(a, weight, 4), exact_acc(a, w).int(), f"int4 {m}x{n}x{k}"
                )


def worst_operands(m: int, n: int, k: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    sign = 1 - 2 * (torch.arange(k) % 2)
    for a_row in (torch.full((k,), 127), torch.full((k,), -127), 127 * sign):
        for w_row in (
            torch.full((k,), limit),
            torch.full((k,), -limit),
            limit * sign,
            -limit * sign,
        ):
            yield a_row.to(torch.int8).repeat(m, 1), w_row.to(torch.int8).repeat(n, 1)


@pytest.mark.parametrize("k", WORST_K)
def test_worst_case_operands(isa: str, k: int) -> None:
    m, n = 9, 33
    for bits, limit in ((8, 127), (4, 7)):
        for a, w in worst_operands(m, n, k, limit):
            total = int(a[0].long() @ w[0].long())
            one = torch.ones(m)
            for form, weight in weight_forms(w, bits):
                for rows in (1, m):
                    y = product(
                        form,
                        a[:rows],
                        one[:rows],
                        weight,
                        torch.ones(n),
                        None,
                        n,
                        bits,
                        -1,
                        torch.float32,
                    )
                    assert bool((y == torch.tensor(total).float()).all()), (
                        form,
                        rows,
                        total,
                        y[0, 0].item(),
                    )
            assert bool((OPS.int_matmul(a, w, bits) == total).all())


def test_largest_k_and_one_more(isa: str) -> None:
    k = 131071
    a, w = torch.full((1, k), 127, dtype=torch.int8), torch.full((2, k), 127, dtype=torch.int8)
    one = torch.ones(1)
    assert OPS.int_matmul(a, w, 8).tolist() == [[127 * 127 * k] * 2]
    for bits, limit in ((8, 127), (4, 7)):
        for sign in (1, -1):
            packed = OPS.repack_weight((w // 127 * limit * sign).to(torch.int8), bits)
            y = OPS.repacked_matmul(a, one, packed, torch.ones(2), None, 2, bits, -1, torch.float32)
            assert y.tolist() == [[torch.tensor(127 * limit * sign * k).float().item()] * 2]
    wide = torch.zeros((1, k + 1), dtype=torch.int8)
    with pytest.raises(RuntimeError, match="a: K"):
        OPS.int_matmul(wide, wide, 8)


def test_every_nibble(isa: str) -> None:
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    w = torch.stack([low.reshape(-1), high.reshape(-1)], dim=1).to(
        torch.int8
    )  # [256, 2], every byte
    a = torch.tensor([[1, 0], [0, 1], [127, -127], [-128, 127]], dtype=torch.int8)
    assert_same_bits(OPS.int_matmul(a, pack(w), 4), exact_acc(a, w).int())
    for m in (1, 4):
        y = OPS.repacked_matmul(
            a[:m],
            torch.ones(m),
            OPS.repack_weight(pack(w), 4),
            torch.ones(256),
            None,
            256,
            4,
            -1,
            torch.float32,
        )
        assert_same_bits(y, exact_acc(a[:m], w).float())


# ---- scaled products -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 3, 17, 64, 129))
@pytest.mark.parametrize("bits", (2, 3, 4, 5, 8))
def test_quantized_matmul_per_channel(isa: str, k: int, bits: int) -> None:
    for n in ODD_MN:
        w, sw, bias = (
            codes(n, k, bits, n),
            scales(n, seed=n + 1),
            torch.randn(n, generator=generator(n + 2)),
        )
        forms = list(weight_forms(w, bits))
        for i, m in enumerate(ODD_MN):
            a, sx, dtype = codes(m, k, 8, m + 3), scales(m, seed=m + 4), DTYPES[i % 3]
            b = bias.to(dtype) if i % 2 else None
            expected = expected_output(a, sx, w, sw, b, -1, dtype)
            for form, weight in forms:
                y = product(form, a, sx, weight, sw, b, n, bits, -1, dtype)
                assert_same_bits(y, expected, f"{form} {m}x{n}x{k}")


@pytest.mark.parametrize(
    "k,group",
    ((64, 32), (256, 64), (256, 128), (96, 96), (60, 12), (30, 6), (35, 5), (9, 3), (7, 1)),
)
@pytest.mark.parametrize("bits", (4, 8))
def test_groups(isa: str, k: int, group: int, bits: int) -> None:
    for n in (1, 17, 65):
        w, sw = codes(n, k, bits, n), scales(n, k // group, seed=n)
        forms = list(weight_forms(w, bits))
        for m in (1, 3, 7, 16, 17):
            a, sx = codes(m, k, 8, m), scales(m, seed=m)
            bias = torch.randn(n, generator=generator(m)) if m % 2 else None
            expected = expected_output(a, sx, w, sw, bias, group, torch.float32)
            for form, weight in forms:
                y = product(form, a, sx, weight, sw, bias, n, bits, group, torch.float32)
                assert_same_bits(y, expected, f"{form} {m}x{n}x{k} group {group}")


def test_empty_k(isa: str) -> None:
    a, w = torch.empty((2, 0), dtype=torch.int8), torch.empty((3, 0), dtype=torch.int8)
    bias = torch.tensor([1.0, 2.0, 3.0])
    for form, weight in weight_forms(w, 4):
        for group, sw in ((-1, torch.ones(3)), (32, torch.ones(3, 0))):
            y = product(form, a, torch.ones(2), weight, sw, bias, 3, 4, group, torch.float32)
            assert_same_bits(y, bias.expand(2, 3), form)
    assert_same_bits(OPS.int_matmul(a, w, 8), torch.zeros((2, 3), dtype=torch.int32))


def test_nan_scale_gives_nan_rows(isa: str) -> None:
    a, sx = codes(3, 40, 8, 1), torch.tensor([1.0, math.nan, 2.0])
    w, sw = codes(33, 40, 4, 2), scales(33, seed=3)
    for form, weight in weight_forms(w, 4):
        y = product(form, a, sx, weight, sw, None, 33, 4, -1, torch.bfloat16)
        assert_same_bits(y, expected_output(a, sx, w, sw, None, -1, torch.bfloat16), form)
        assert bool(y[1].isnan().all()) and not bool(y[0].isnan().any())


@pytest.mark.parametrize("k,n,m", ((1024, 96, 40), (4096, 64, 9), (1536, 576, 50)))
def test_larger_shapes_agree(isa: str, k: int, n: int, m: int) -> None:
    """Cache groups, equal row cuts and the copied activations (K a multiple of 1024)."""
    if isa == "scalar":
        m = min(m, 9)
    a, sx, sw = codes(m, k, 8, 1), scales(m, seed=2), scales(n, seed=3)
    for bits in (4, 8):
        w = codes(n, k, bits, 4)
        expected = expected_output(a, sx, w, sw, None, -1, torch.float32)
        for form, weight in weight_forms(w, bits):
            assert_same_bits(
                product(form, a, sx, weight, sw, None, n, bits, -1, torch.float32), expected, form
            )


def test_threads_and_batch_do_not_change_bits() -> None:
    k, n, m = 260, 200, 130
    a, sx, w, sw = (
        codes(m, k, 8, 1),
        scales(m, seed=2),
        codes(n, k, 4, 3),
        scales(n, k // 20, seed=4),
    )
    x = torch.randn(m, k, generator=generator(5))
    weight, head = (
        OPS.repack_weight(w, 4),
        OPS.repack_weight(torch.randn(n, k, generator=generator(6)), 32),
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    OPS.quantized_matmul(a, sx, w, sw, None, 4, 20, torch.float32),
                    OPS.repacked_matmul(a, sx, weight, sw, None, n, 4, 20, torch.float32),
                    OPS.float_matmul(x, head, None, n),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)
    assert_same_bits(results[0][0], results[0][1])
    for rows in (slice(0, 1), slice(3, 10), slice(77, 130)):
        packed = OPS.repacked_matmul(a[rows], sx[rows], weight, sw, None, n, 4, 20, torch.float32)
        assert_same_bits(packed, results[0][1][rows])
        assert_same_bits(OPS.float_matmul(x[rows], head, None, n), results[0][2][rows])


def test_leading_dimensions_and_strides(isa: str) -> None:
    a, w, sw = codes(6, 34, 8, 1), codes(5, 34, 4, 2), scales(5, seed=3)
    sx = scales(6, seed=4)
    expected = expected_output(a, sx, w, sw, None, -1, torch.float32)
    y = OPS.quantized_matmul(a.view(2, 3, 34), sx.view(2, 3), w, sw, None, 4, -1, torch.float32)
    assert_same_bits(y, expected.view(2, 3, 5))
    strided = a.t().contiguous().t()
    assert_same_bits(
        OPS.quantized_matmul(strided, sx, w.t().contiguous().t(), sw, None, 4, -1, torch.float32),
        expected,
    )
    flat = torch.zeros(a.numel() + 3, dtype=torch.int8)
    flat[3:] = a.reshape(-1)
    packed = OPS.repack_weight(w, 4)
    moved = torch.zeros(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    y = OPS.repacked_matmul(flat[3:].view(6, 34), sx, moved, sw, None, 5, 4, -1, torch.float32)
    assert_same_bits(y, expected)


def test_reads_stay_inside(isa: str) -> None:
    """Bytes around the operands are poisoned: a kernel that used them would be wrong."""
    for k in (5, 33, 66):
        for poison in (127, -128):
            for m, n in ((1, 3), (9, 33)):
                a_all = torch.full((m * k + 128,), poison, dtype=torch.int8)
                w_all = torch.full((n * k + 128,), poison, dtype=torch.int8)
                a, w = a_all[64 : 64 + m * k].view(m, k), w_all[64 : 64 + n * k].view(n, k)
                a.copy_(codes(m, k, 8, k))
                w.copy_(codes(n, k, 8, k + 1))
                assert_same_bits(OPS.int_matmul(a, w, 8), exact_acc(a, w).int())


# ---- arguments -----------------------------------------------------------------------------------


def test_bad_arguments_name_themselves() -> None:
    a, w, sx, sw = codes(2, 8, 8, 1), codes(3, 8, 4, 2), torch.ones(2), torch.ones(3)

    def call(**change: object) -> None:
        args = {
            "a": a,
            "sx": sx,
            "w": w,
            "sw": sw,
            "bias": None,
            "bits": 4,
            "group": -1,
            "dtype": torch.float32,
        }
        OPS.quantized_matmul(*(args | change).values())

    call()
    for change, name in (
        ({"a": a.float()}, "a: "),
        ({"w": w[:, :7]}, "w: "),
        ({"w": w.float()}, "w: "),
        ({"w": pack(w), "bits": 8}, "w: "),
        ({"sx": torch.ones(3)}, "a_scale: "),
        ({"sw": torch.ones(2)}, "w_scale: "),
        ({"sw": sw.double()}, "w_scale: "),
        ({"bias": torch.ones(2)}, "bias: "),
        ({"bits": 9}, "w_bits: "),
        ({"group": 3}, "group_size: "),
        ({"group": 0}, "group_size: "),
        ({"dtype": torch.float64}, "dtype: "),
    ):
        with pytest.raises(RuntimeError, match=name):
            call(**change)
