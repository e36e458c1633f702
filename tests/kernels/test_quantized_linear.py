"""quantized_linear, quantized_matmul, int_matmul, qat_linear and the repacked forms: spec 7, 8,
17.
"""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.spec.quantize import qmax
from llmqat_kernels.testing import DTYPES, assert_same_bits, assert_within_ratio, generator

ops = torch.ops.llmqat
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (3, 17, 33),
    (7, 16, 64),
    (16, 65, 127),
    (33, 48, 576),
    (1, 96, 1536),
]


def weights(n: int, k: int, bits: int, group_size: int = -1):
    w = torch.randn(n, k, generator=generator(n * 1000 + k))
    return qk.quantize(w, bits, group_size=group_size, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 8), (4, 6), (2, 8), (3, 5), (8, 4)])
def test_equals_spec(backend, dtype, m, n, k, w_bits, a_bits):
    if backend == "triton":
        wide, usual = k > 500 and dtype != torch.bfloat16, (w_bits, a_bits) == (4, 8)
        if wide or not (usual or (m, n, k) == (3, 17, 33)):
            pytest.skip("interpreted: every width at one shape, wide rows in bf16 only, for time")
    x = torch.randn(m, k, generator=generator(m)).to(dtype)
    w, scale = weights(n, k, w_bits)
    bias = torch.randn(n, generator=generator(1)).to(dtype)
    for b in (None, bias):
        want = spec.quantized_linear(x, w, scale, b, w_bits, a_bits)
        assert_same_bits(qk.quantized_linear(x, w, scale, b, w_bits=w_bits, a_bits=a_bits), want)
        if w_bits == 4:
            packed = qk.pack_int4(w)
            assert_same_bits(
                qk.quantized_linear(x, packed, scale, b, w_bits=4, a_bits=a_bits), want, "packed"
            )


@pytest.mark.parametrize("group_size", [4, 16, 32, 64])
@pytest.mark.parametrize("w_bits", [4, 8])
def test_groups(backend, group_size, w_bits):
    x = torch.randn(5, 192, generator=generator(3))
    w, scale = weights(37, 192, w_bits, group_size)
    want = spec.quantized_linear(x, w, scale, None, w_bits, 8, group_size)
    got = qk.quantized_linear(x, w, scale, w_bits=w_bits, a_bits=8, group_size=group_size)
    assert_same_bits(got, want)


def repacked(a, a_scale, w, scale, w_bits, n, group_size=-1):
    layout = qk.repack_weight(w, w_bits)
    return qk.repacked_matmul(a, a_scale, layout, scale, n=n, w_bits=w_bits, group_size=group_size)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_repacked_equals_plain(backend, m, n, k):
    a, a_scale = qk.quantize(torch.randn(m, k, generator=generator(m)), 8)
    for w_bits in (4, 8):
        w, scale = weights(n, k, w_bits)
        want = spec.quantized_matmul(a, a_scale, w, scale, None, w_bits, -1, torch.float32)
        assert_same_bits(repacked(a, a_scale, w, scale, w_bits, n), want, f"{w_bits} bits")
        if w_bits == 4:
            assert_same_bits(
                repacked(a, a_scale, qk.pack_int4(w), scale, 4, n), want, "from packed"
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_gate_and_up_equal_two_steps(backend, dtype):
    for m, n, k, w_bits, group_size in ((3, 22, 33, 4, -1), (2, 34, 64, 8, -1), (2, 8, 64, 4, 32)):
        a, a_scale = qk.quantize(torch.randn(m, k, generator=generator(m)), 8)
        w, scale = weights(n, k, w_bits, group_size)
        bias = torch.randn(n, generator=generator(1)).to(dtype)
        y = spec.quantized_matmul(a, a_scale, w, scale, bias, w_bits, group_size, dtype)
        got = qk.repacked_matmul_silu_mul(
            a, a_scale, qk.repack_weight(w, w_bits), scale, bias,
            n=n, w_bits=w_bits, group_size=group_size, dtype=dtype,
        )  # fmt: skip
        assert_same_bits(got, qk.silu_mul(y[:, : n // 2].contiguous(), y[:, n // 2 :].contiguous()))
    with pytest.raises(qk.InvalidArgument, match="even"):
        qk.repacked_matmul_silu_mul(a, a_scale, w, torch.ones(7), n=7, w_bits=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_to_the_rounded_product(backend, dtype):
    for m, n, k, w_bits, group_size in ((3, 22, 33, 4, -1), (2, 34, 64, 8, -1), (2, 8, 64, 4, 32)):
        x, residual = (torch.randn(m, c, generator=generator(c)).to(dtype) for c in (k, n))
        a, a_scale = qk.quantize(x, 8)
        w, scale = weights(n, k, w_bits, group_size)
        bias = torch.randn(n, generator=generator(1)).to(dtype)
        layout, kind = qk.repack_weight(w, w_bits), (w_bits, group_size)
        y = spec.quantized_matmul(a, a_scale, w, scale, bias, *kind, dtype)
        options = {"n": n, "w_bits": w_bits, "group_size": group_size, "residual": residual}
        got = qk.repacked_matmul_add(a, a_scale, layout, scale, bias, **options)
        assert_same_bits(got, (y.float() + residual.float()).to(dtype))
        y = spec.repacked_linear(x, w, scale, bias, n, *kind)
        del options["residual"]
        plain = qk.repacked_linear(x, layout, scale, bias, **options)
        got = qk.repacked_linear_add(x, layout, scale, bias, residual=residual, **options)
        assert_same_bits(got, (plain.float() + residual.float()).to(dtype))


def test_a_residual_that_does_not_fit_is_refused():
    a, a_scale = qk.quantize(torch.randn(3, 16), 8)
    w, scale = weights(6, 16, 4)
    layout, options = qk.repack_weight(w, 4), {"n": 6, "w_bits": 4}
    for residual in (torch.randn(3, 7), torch.randn(6)):
        with pytest.raises(qk.InvalidArgument, match="residual"):
            qk.repacked_matmul_add(a, a_scale, layout, scale, residual=residual, **options)
    with pytest.raises(qk.InvalidArgumentType, match="residual"):
        qk.repacked_matmul_add(
            a, a_scale, layout, scale, residual=torch.ones(3, 6, dtype=torch.int32), **options
        )
    with pytest.raises(qk.InvalidArgumentType, match="residual"):  # not of x's dtype
        residual = torch.randn(3, 6, dtype=torch.float16)
        qk.repacked_linear_add(torch.randn(3, 16), layout, scale, residual=residual, **options)


@pytest.mark.parametrize("k", [1, 31, 33, 1040, 1041, 4096, 11008, 28672])
@pytest.mark.parametrize("w_bits", [4, 8])
def test_worst_case_accumulators(backend, k, w_bits):
    """fp32 accumulation would be wrong from K = 1041 on, and random operands would not show it."""
    top = qmax(w_bits)
    a = torch.full((2, k), 127, dtype=torch.int8)
    a[1, 1::2] = -127
    w = torch.full((3, k), top, dtype=torch.int8)
    w[1] = -top
    w[2, ::2] = -top
    want = a.to(torch.int64) @ w.to(torch.int64).T
    assert_same_bits(ops.int_matmul(a, w, w_bits).to(torch.int64), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_activations_follow_the_ratio_rule(backend, dtype):
    x = torch.randn(9, 64, generator=generator(4)).to(dtype)
    w, scale = weights(24, 64, 4)
    dense = qk.dequantize(w, scale, dtype=dtype)
    exact = x.double() @ dense.double().T
    got = qk.quantized_linear(x, qk.pack_int4(w), scale, w_bits=4, a_bits=16)
    assert got.dtype == dtype
    assert_within_ratio(got, x @ dense.T, exact, slack=1e-2 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("w_bits", "group_size"), [(4, -1), (8, -1), (3, 16), (4, 32)])
def test_repacked_float_activations(backend, dtype, w_bits, group_size):
    x = torch.randn(2, 3, 64, generator=generator(4)).to(dtype)
    w, scale = weights(23, 64, w_bits, group_size)
    bias = torch.randn(23, generator=generator(5)).to(dtype)
    layout, slack = qk.repack_weight(w, w_bits), 1e-2 if dtype != torch.float32 else 1e-6
    dense = qk.dequantize(w, scale, group_size=group_size, dtype=dtype)
    for b in (None, bias):
        options = {"n": 23, "w_bits": w_bits, "group_size": group_size}
        got = qk.repacked_linear(x, layout, scale, b, **options)
        plain = torch.nn.functional.linear(x, dense, b)
        wide = None if b is None else b.double()
        exact = torch.nn.functional.linear(x.double(), dense.double(), wide)
        assert got.dtype == dtype
        assert_within_ratio(got, plain, exact, slack=slack)
        stored = qk.quantized_linear(
            x, w, scale, b, w_bits=w_bits, a_bits=16, group_size=group_size
        )
        assert_same_bits(got, stored, "row-major")


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (dict(x=torch.ones(2, 8).long()), qk.InvalidArgumentType, "x"),
        (dict(w_bits=16), qk.InvalidArgument, "w_bits"),
        (dict(group_size=5), qk.InvalidArgument, "group_size"),
        (dict(n=4), qk.InvalidArgument, "w_scale"),
        (dict(w_scale=torch.ones(3, dtype=torch.float64)), qk.InvalidArgumentType, "w_scale"),
        (dict(bias=torch.ones(4)), qk.InvalidArgument, "bias"),
        (dict(x=torch.ones(2, 8, device="meta")), qk.InvalidArgument, "meta"),
    ],
)
def test_repacked_linear_names_the_wrong_argument(change, error, word):
    layout = qk.repack_weight(torch.ones(3, 8, dtype=torch.int8), 4)
    args = dict(x=torch.ones(2, 8), w=layout, w_scale=torch.ones(3), n=3, w_bits=4) | change
    with pytest.raises(error, match=word):
        qk.repacked_linear(**args)


def test_a_row_does_not_depend_on_the_others(backend):
    x = torch.randn(65, 96, generator=generator(6))
    w, scale = weights(50, 96, 4)
    whole = qk.quantized_linear(x, w, scale, w_bits=4, a_bits=8)
    for rows in (slice(0, 1), slice(3, 10), slice(64, 65), slice(10, 50)):
        assert_same_bits(qk.quantized_linear(x[rows], w, scale, w_bits=4, a_bits=8), whole[rows])


def test_float_matmul(backend):
    for storage in (torch.float32, torch.bfloat16):
        w = torch.randn(70, 48, generator=generator(7)).to(storage)
        x = torch.randn(13, 48, generator=generator(8))
        layout = qk.repack_weight(w, 16)
        got = qk.float_matmul(x, layout, n=70)
        assert_within_ratio(got, x @ w.float().T, x.double() @ w.double().T)
        if backend == "cpu":
            assert_same_bits(
                qk.float_matmul(x[4:5], layout, n=70), got[4:5], "a row of a smaller batch"
            )


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8)])
def test_empty_batch(backend, shape):
    w, scale = weights(5, 8, 4)
    y = qk.quantized_linear(torch.empty(shape), w, scale, w_bits=4, a_bits=8)
    assert y.shape == (*shape[:-1], 5)


def test_poisoned_row_stays_poisoned_and_alone(backend):
    x = torch.randn(4, 32, generator=generator(5))
    clean = x.clone()
    x[2, 7] = float("nan")
    w, scale = weights(6, 32, 4)
    y = qk.quantized_linear(x, w, scale, w_bits=4, a_bits=8)
    assert y[2].isnan().all()
    keep = [0, 1, 3]
    assert_same_bits(y[keep], qk.quantized_linear(clean, w, scale, w_bits=4, a_bits=8)[keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ste_clip", [None, 1.5])
def test_qat_linear_serves_what_it_trains(backend, dtype, ste_clip):
    x = torch.randn(2, 5, 32, generator=generator(1)).to(dtype).requires_grad_()
    weight = torch.randn(12, 32, generator=generator(2)).requires_grad_()
    bias = torch.randn(12, generator=generator(3)).requires_grad_()
    y = qk.qat_linear(x, weight, bias, w_bits=4, a_bits=8, ste_clip=ste_clip)
    codes, scale = qk.quantize(weight.detach(), 4, scale_dtype=torch.bfloat16)
    served = qk.quantized_linear(
        x.detach(), qk.pack_int4(codes), scale, bias.detach(), w_bits=4, a_bits=8
    )
    assert_same_bits(y.detach(), served)

    grad = torch.randn(y.shape, generator=generator(4)).to(dtype)
    y.backward(grad)
    xq = qk.fake_quantize(x.detach(), 8).double()
    wq = qk.dequantize(codes, scale).double()
    dx = grad.double() @ wq
    dw = torch.einsum("btn,btk->nk", grad.double(), xq)
    if ste_clip is not None:
        dx = torch.where(x.detach().abs() < ste_clip, dx, 0.0)
        dw = torch.where(weight.detach().abs() < ste_clip, dw, 0.0)
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in ((x.grad, dx), (weight.grad, dw), (bias.grad, grad.double().sum((0, 1)))):
        assert (got.double() - want).abs().max() <= slack * want.abs().max()
        assert ((got == 0) | (want != 0)).all() if ste_clip else True


def test_qat_linear_saves_only_codes_and_scales(backend):
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    codes, scale = qk.quantize(weight.detach(), 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk.qat_linear(x, weight, w_bits=4, a_bits=8, w_codes=codes, w_scale=scale)
    assert sum(t.nbytes for t in saved) == x.numel() + 64 * 4 + codes.numel() + 16 * 4


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (dict(w_bits=9), qk.InvalidArgument, "w_bits"),
        (dict(a_bits=9), qk.InvalidArgument, "a_bits"),
        (dict(a_bits=1), qk.InvalidArgument, "a_bits"),
        (dict(group_size=5), qk.InvalidArgument, "group_size"),
        (dict(x=torch.ones(2, 9)), qk.InvalidArgument, "w"),
        (dict(x=torch.ones(2, 8).long()), qk.InvalidArgumentType, "x"),
        (dict(w=torch.ones(3, 8)), qk.InvalidArgumentType, "w"),
        (dict(w=torch.ones(8, dtype=torch.int8)), qk.InvalidArgument, "w"),
        (dict(w=torch.ones(3, 4, dtype=torch.uint8), w_bits=8), qk.InvalidArgument, "w"),
        (dict(w_scale=torch.ones(4)), qk.InvalidArgument, "w_scale"),
        (dict(w_scale=torch.ones(3, dtype=torch.float64)), qk.InvalidArgumentType, "w_scale"),
        (dict(bias=torch.ones(4)), qk.InvalidArgument, "bias"),
        (dict(bias=torch.ones(3).long()), qk.InvalidArgumentType, "bias"),
        (dict(x=torch.ones(2, 8, device="meta")), qk.InvalidArgument, "meta"),
    ],
)
def test_bad_arguments(backend, change, error, word):
    arguments = {"x": torch.ones(2, 8), "w": torch.ones(3, 8, dtype=torch.int8)}
    arguments |= {"w_scale": torch.ones(3), "bias": None, "w_bits": 4, "a_bits": 8} | change
    with pytest.raises(error, match=word) as caught:
        qk.quantized_linear(**arguments)
    assert "\n" not in str(caught.value)
