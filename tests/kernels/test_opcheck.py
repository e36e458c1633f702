"""Every operator: schema, fake kernel, autograd registration and tracing, by
`torch.library.opcheck`.
"""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.schemas import SCHEMAS

ops = torch.ops.llmqat


def _linear(k=16, n=6, bits=4):
    return qk.quantize(torch.randn(n, k), bits)


def _grad(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _quantize():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield torch.randn(3, 16, dtype=dtype), 8
        yield torch.randn(2, 3, 16, dtype=dtype), 4, 8, True
    yield torch.randn(0, 16), 8


def _dequantize():
    codes, scale = qk.quantize(torch.randn(3, 16), 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield codes, scale, -1, dtype


def _fake_quantize():
    for dtype in (torch.float32, torch.bfloat16):
        yield _grad(3, 16, dtype=dtype), 4
        yield _grad(3, 16, dtype=dtype), 4, 8, 2.0, True


def _fake_quantize_channels():
    for dtype in (torch.float32, torch.bfloat16):
        yield _grad(3, 16, dtype=dtype), 4, 4
        yield _grad(2, 3, 16, dtype=dtype), 4, 1, 1.0


def _fake_quantize_backward():
    yield torch.randn(3, 16), torch.randn(3, 16), 1.0
    yield torch.randn(3, 16), torch.randn(3, 16), None


def _pack_int4():
    yield (qk.quantize(torch.randn(3, 7), 4)[0],)


def _unpack_int4():
    yield torch.randint(0, 256, (3, 4), dtype=torch.uint8), 7


def _int_matmul():
    yield qk.quantize(torch.randn(3, 16), 8)[0], _linear()[0], 4


def _quantized_matmul():
    a, a_scale = qk.quantize(torch.randn(3, 16), 8)
    for dtype in (torch.float32, torch.bfloat16):
        yield a, a_scale, *_linear(), torch.randn(6), 4, -1, dtype


def _quantized_linear():
    codes, scale = _linear()
    yield torch.randn(3, 16), codes, scale, None, 4, 8
    yield torch.randn(2, 3, 16), qk.pack_int4(codes), scale, torch.randn(6), 4, 8
    yield torch.randn(3, 16), codes, scale, None, 4, 16


def _qat_linear():
    codes, scale = _linear()
    yield _grad(3, 16), _grad(6, 16), codes, scale, None, 8
    yield _grad(2, 3, 16), _grad(6, 16), codes, scale, _grad(6), 8, -1, 1.0


def _qat_matmul():
    a, a_scale = qk.quantize(torch.randn(3, 16), 8)
    weight = torch.randn(6, 16)
    codes, scale = qk.quantize(weight, 4)
    yield _grad(3, 16), a, a_scale, _grad(6, 16), codes, scale, None, None
    yield _grad(3, 16), a, a_scale, _grad(6, 16), codes, scale, None, _grad(6), -1, 1.0
    codes, multiplier, scale = qk.quantize_integer_groups(weight, 4, group_size=8)
    yield _grad(3, 16), a, a_scale, _grad(6, 16), codes, scale, multiplier, _grad(6), 8


def _qat_matmul_backward_input():
    for dtype in (torch.float32, torch.bfloat16):
        yield torch.randn(2, 3, 6, dtype=dtype), *_linear(), -1
        yield torch.randn(3, 6, dtype=dtype), *qk.quantize(torch.randn(6, 16), 4, group_size=8), 8


def _qat_matmul_backward_weight():
    for dtype in (torch.float32, torch.bfloat16):
        rows = qk.quantize(torch.randn(2, 3, 16), 8)
        yield torch.randn(2, 3, 6, dtype=dtype), *rows, torch.float32
        yield torch.randn(2, 3, 6, dtype=dtype), *rows, dtype


def _quantize_integer_groups():
    yield torch.randn(6, 16), 4, 8
    yield torch.randn(2, 3, 16, dtype=torch.bfloat16), 3, 4


def _integer_group_matmul():
    a, a_scale = qk.quantize(torch.randn(2, 3, 16), 8)
    codes, multiplier, scale = qk.quantize_integer_groups(torch.randn(6, 16), 4, group_size=8)
    yield a, a_scale, codes, multiplier, scale, None, 8, torch.float32
    yield a, a_scale, qk.pack_int4(codes), multiplier, scale, torch.randn(6), 8, torch.bfloat16
    yield qk.pack_int4(a), a_scale, codes, multiplier, scale, None, 8, torch.float32


def _repacked_matmul():
    a, a_scale = qk.quantize(torch.randn(3, 16), 8)
    codes, scale = _linear()
    yield a, a_scale, qk.repack_weight(codes, 4), scale, None, 6, 4, -1, torch.float32


def _repacked_matmul_silu_mul():
    a, a_scale = qk.quantize(torch.randn(2, 3, 16), 8)
    codes, scale = _linear()
    yield a, a_scale, qk.repack_weight(codes, 4), scale, None, 6, 4, -1, torch.bfloat16


def _repacked_matmul_add():
    for dtype in (torch.float32, torch.bfloat16):
        a, a_scale = qk.quantize(torch.randn(2, 3, 16), 8)
        codes, scale = _linear()
        residual = torch.randn(2, 3, 6, dtype=dtype)
        yield a, a_scale, qk.repack_weight(codes, 4), scale, None, residual, 6, 4, -1


def _repacked_linear_add():
    codes, scale = _linear(bits=4)
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = torch.randn(2, 3, 16, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
        yield x, qk.repack_weight(codes, 4), scale, torch.randn(6), residual, 6, 4, -1


def _repacked_linear():
    for bits in (4, 8):
        codes, scale = _linear(bits=bits)
        layout = qk.repack_weight(codes, bits)
        yield torch.randn(3, 16), layout, scale, None, 6, bits, -1
        yield (
            torch.randn(2, 3, 16, dtype=torch.bfloat16),
            layout,
            scale,
            torch.randn(6),
            6,
            bits,
            -1,
        )
    codes, scale = qk.quantize(torch.randn(6, 16), 4, group_size=8)
    yield torch.randn(3, 16), qk.repack_weight(codes, 4), scale, None, 6, 4, 8


def _repack_weight():
    yield _linear()[0], 4
    yield torch.randn(6, 16), 16


def _float_matmul():
    yield torch.randn(3, 16), qk.repack_weight(torch.randn(6, 16), 16), None, 6


def _rms_norm():
    yield torch.randn(3, 16), torch.randn(16), 1e-5


def _rms_norm_quantize():
    yield torch.randn(3, 16), torch.randn(16), 1e-5, 8
    yield torch.randn(3, 16), torch.randn(16), 1e-5, 8, torch.randn(3, 16)


def _rms_norm_quantize_train():
    yield _grad(3, 16), _grad(16), 1e-5, 8
    yield _grad(3, 16), _grad(16), 1e-5, 8, _grad(3, 16)
    yield _grad(3, 16), _grad(16), 1e-5, 8, None, False
    yield _grad(2, 3, 16), _grad(16), 1e-5, 4, _grad(2, 3, 16), False


def _rms_norm_backward():
    for dtype in (torch.float32, torch.bfloat16):
        grad, x = torch.randn(2, 3, 16, dtype=dtype)
        yield grad, x, torch.randn(16), 1e-5
        yield grad, x, torch.randn(16, dtype=dtype), 1e-5, torch.randn(3, 16, dtype=dtype)


def _silu_mul():
    yield torch.randn(3, 16), torch.randn(3, 16)


def _silu_mul_quantize():
    yield torch.randn(3, 16), torch.randn(3, 16), 8


def _silu_mul_quantize_train():
    yield _grad(3, 16), _grad(3, 16), 8
    yield _grad(3, 16), _grad(3, 16), 8, False


def _silu_mul_qat_matmul():
    codes, scale = _linear()
    pair = _grad(3, 16), _grad(3, 16)
    yield *pair, 8, _grad(6, 16), codes, scale, None, None
    yield *pair, 8, _grad(6, 16), codes, scale, None, _grad(6), -1, 1.0
    codes, multiplier, scale = qk.quantize_integer_groups(torch.randn(6, 16), 4, group_size=8)
    yield *pair, 8, _grad(6, 16), codes, scale, multiplier, _grad(6), 8


def _silu_mul_backward():
    yield tuple(torch.randn(3, 3, 16))
    yield tuple(torch.randn(3, 2, 3, 16, dtype=torch.bfloat16))


def _tables(length=8, dim=4):
    angles = torch.outer(torch.arange(length).float(), torch.logspace(0, -2, dim))
    return angles.cos(), angles.sin()


def _rope():
    yield _grad(3, 2, 8), *_tables(), torch.tensor([0, 3, 7])


def _rope_fake_quantize():
    places = *_tables(), torch.tensor([0, 3, 7])
    for pre_rope in (False, True):
        for bits in (4, 8, 16):
            yield _grad(3, 2, 8), _grad(3, 2, 8), *places, bits, pre_rope
        yield _grad(3, 2, 8), _grad(3, 2, 8), *places, 8, pre_rope, 1.0


def _caches():
    for mode in ("paper", "serving"):
        for bits in (4, 8, 16):
            yield qk.KVCache.allocate(2, 2, 8, 8, bits=bits, mode=mode)


def _rope_quantize_append():
    for cache in _caches():
        codes = cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
        yield (
            torch.randn(3, 2, 8),
            torch.randn(3, 2, 8),
            *_tables(),
            *codes,
            *index,
            cache.bits,
            cache.pre_rope,
        )


def _attention_decode():
    for cache in _caches():
        codes = cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 5, 8])
        yield torch.randn(3, 4, 8), *codes, *_tables(), *index, 0.3, cache.bits, cache.pre_rope


def _paged():
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    for mode in ("paper", "serving"):
        for bits in (4, 8, 16):
            cache = qk.KVCache.allocate(4, 2, 64, 8, bits=bits, mode=mode)
            yield cache, (cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale, table)


def _rope_quantize_append_paged():
    for cache, codes in _paged():
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 7])
        x = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        yield *x, *_tables(), *codes, *index, cache.bits, cache.pre_rope


def _rope_quantize_append_queries():
    for cache, codes in _paged():
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 7])
        x = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        for table in (None, codes[-1]):
            rest = *codes[:-1], table, *index, cache.bits, cache.pre_rope
            yield *x, *_tables(), *rest


def _attention_decode_paged():
    for cache, codes in _paged():
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 5, 8])
        mode = 0.3, cache.bits, cache.pre_rope
        yield torch.randn(3, 4, 8), *codes, *_tables(), *index, 8, *mode


def _attention_decode_quantize():
    for cache, codes in _paged():
        index = torch.tensor([0, 1, 1]), torch.tensor([0, 5, 8])
        mode = 0.3, cache.bits, cache.pre_rope
        for table in (None, codes[-1]):
            yield torch.randn(3, 4, 8), *codes[:-1], table, *_tables(), *index, 8, *mode, 8


def _distillation_loss():
    valid = torch.tensor([True, True, False, True, True])
    yield _grad(5, 8), _grad(12, 8), torch.randn(5, 6), torch.randn(12, 6)
    yield _grad(5, 8), _grad(12, 8), torch.randn(5, 6), torch.randn(12, 6), valid, 2


def _distillation_loss_logits():
    valid = torch.tensor([True, True, False, True, True])
    yield _grad(5, 12), torch.randn(5, 12)
    yield _grad(5, 12), torch.randn(5, 12), valid, 2


def _distillation_loss_top_k():
    valid = torch.tensor([True, True, False, True, True])
    top = torch.softmax(torch.randn(5, 12), -1).topk(3)
    yield _grad(5, 8), _grad(12, 8), *top
    yield _grad(5, 8), _grad(12, 8), *top, valid, 2


def _sample():
    n = torch.arange(3)
    yield torch.randn(3, 20), n, n, n == 0, 1
    yield torch.randn(3, 20), n, n, n == 0, 1, 0.5, 5


CASES = [(op, index, case) for op in SCHEMAS for index, case in enumerate(globals()[f"_{op}"]())]


def test_every_operator_has_cases():
    assert {op for op, _, _ in CASES} == set(SCHEMAS)


@pytest.mark.parametrize(("op", "index"), [(op, index) for op, index, _ in CASES])
def test_opcheck(backend, op, index):
    case = list(globals()[f"_{op}"]())[
        index
    ]  # made under this backend: weight layouts belong to one
    if op == "repack_weight":
        # the layout's size is the backend's own business, so it has no static fake shape: schema
        # only
        torch.library.opcheck(getattr(ops, op).default, case, test_utils="test_schema")
        return
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The tracing check compares outputs, and a gradient handle is NaN:
    # test_compiles_with_a_gradient_handle traces that form. What is traced is the same for every
    # backend, so the others trace one case of each operator.
    handle = case[-1] is False and op.endswith("_train")
    if not handle and (backend == "reference" or index == 0):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, op).default, case, test_utils=checks)


def test_inference_forms_refuse_a_gradient(backend):
    x = torch.randn(2, 16, requires_grad=True)
    codes, scale = _linear()
    y = qk.quantized_linear(x, codes, scale, w_bits=4, a_bits=8)
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()


def test_compiles_without_graph_breaks(backend):
    weight = torch.randn(6, 16, requires_grad=True)

    def step(x):
        return qk.qat_linear(qk.fake_quantize(x, 8), weight, w_bits=4, a_bits=8).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 5):
        x = torch.randn(rows, 16, requires_grad=True)
        loss = compiled(x)
        (got,) = torch.autograd.grad(loss, x)
        (want,) = torch.autograd.grad(step(x), x)
        assert torch.equal(got, want)


def test_compiles_with_a_gradient_handle(backend):
    norm, weight = torch.randn(16, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    codes, scale = qk.quantize(weight.detach(), 4)

    def step(x):
        y, a, a_scale, _ = qk.rms_norm_quantize_train(x, norm, 1e-5, 8, values=False)
        return qk.qat_matmul(y, a, a_scale, weight, w_codes=codes, w_scale=scale).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16, requires_grad=True)
    got = torch.autograd.grad(compiled(x), (x, norm, weight))
    want = torch.autograd.grad(step(x), (x, norm, weight))
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, b)
