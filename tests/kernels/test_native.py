"""The native library: loading, schemas, and row operators bit for bit on every instruction set."""

import json
import os
import subprocess
import sys

import pytest
import torch

from llmqat_kernels import native
from llmqat_kernels.errors import BackendUnavailable
from llmqat_kernels.schemas import SCHEMAS
from llmqat_kernels.spec import quantize as spec

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_not())

OPS = torch.ops.llmqat_cpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY_OPS = {"build_info", "get_isa", "set_isa", "detected_isa"}
# Steps from which Python puts an operator of schemas.py together; not public.
INNER_OPS = {"soft_cross_entropy", "decoder_blocks", "screened_argmax"}
# One value, primes, and every vector width (8, 16, 32, 64) with its neighbours.
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1031)


def assert_same(actual, expected):
    """Equal dtype, shape and bits; any NaN equals any NaN; -0 differs from 0."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~actual.isnan())
        actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(actual, expected)


def expected_quantize(x, bits, bf16_scale):
    """Spec 1-4 once more, in fp64 with explicit roundings to fp32: independent of the spec module.

    A double holds a product or quotient of two floats closely enough that rounding it again gives
    the fp32 result: 53 >= 2 * 24 + 2.
    """
    limit = 2 ** (bits - 1) - 1
    rows = x.to(torch.float64)
    amax = rows.abs().amax(dim=-1)
    scale = (amax / limit).float()
    scale = scale.bfloat16().float() if bf16_scale else scale
    zero = (amax < 2.0**-100) | ~rows.isfinite().all(dim=-1)
    scale = torch.where(amax < 2.0**-100, torch.ones_like(scale), scale)
    scale = torch.where(rows.isfinite().all(dim=-1), scale, torch.full_like(scale, float("nan")))
    inv = (1.0 / scale.double()).float()
    codes = (rows * inv.double()[..., None]).float().clamp(-limit, limit).double().round()
    return torch.where(zero[..., None], torch.zeros_like(codes), codes).to(torch.int8), scale


def adversarial_rows(length, dtype):
    """Rows of every kind that has hurt somebody: see the names."""
    generator = torch.Generator().manual_seed(length)
    noise = torch.randn(length, generator=generator)
    ties = (torch.arange(length) % 254 - 126.5) / 8
    ties[0] = 127 / 8  # scale 1/8 at 8 bits: every other value is a tie
    outlier = noise.clone()
    outlier[length // 2] = 1e4
    rows = {
        "noise": noise,
        "ties": ties,
        "outlier": outlier,
        "zero": torch.zeros(length),
        "negative_zero": torch.full((length,), -0.0),
        "denormal": noise * 1e-41,
        "below_2^-100": noise.clamp(-1, 1) * 2.0**-101,
        "just_above_2^-100": torch.full((length,), 2.0**-100),
        "huge": noise.clamp(-1, 1) * torch.finfo(dtype).max,
        "nan": torch.where(torch.arange(length) == length - 1, float("nan"), noise),
        "inf": torch.where(torch.arange(length) == length // 3, -float("inf"), noise),
    }
    return torch.stack([row.to(dtype) for row in rows.values()])


def test_every_instruction_set_is_collected():
    assert native.supported_isas()[0] == "scalar"
    assert set(native.supported_isas()) <= set(native.ISAS) == set(native.build_info()["isas"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_dequantize_fake_quantize(isa, dtype):
    for length in LENGTHS:
        x = adversarial_rows(length, dtype)
        for bits in range(2, 9):
            for bf16_scale in (False, True):
                codes, scale = OPS.quantize(x, bits, -1, bf16_scale)
                for want_codes, want_scale in (
                    expected_quantize(x, bits, bf16_scale),
                    spec.quantize(x, bits, -1, bf16_scale),
                ):
                    assert_same(codes, want_codes)
                    assert_same(scale, want_scale)
                want = (codes.float() * scale[..., None]).to(dtype)
                assert_same(OPS.dequantize(codes, scale, -1, dtype), want)
                assert_same(OPS.fake_quantize(x, bits, -1, None, bf16_scale), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_16_bit_value(isa, dtype):
    """All 65536 bit patterns: as rows of one value, and as values beside a fixed largest one."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    alone = patterns.reshape(-1, 1)
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 2.0**20
    beside = torch.where(patterns.abs() <= largest, patterns, 1.0).reshape(-1, 64)
    beside = torch.nn.functional.pad(beside, (0, 1), value=largest)
    for x in (alone, beside):
        codes, scale = OPS.quantize(x, 8)
        want_codes, want_scale = expected_quantize(x, 8, False)
        assert_same(codes, want_codes)
        assert_same(scale, want_scale)
        want = (codes.float() * scale[..., None]).to(dtype)
        assert_same(OPS.fake_quantize(x, 8), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_casts_round_to_nearest_even(isa, dtype):
    """dequantize of code 1 is a bare cast of the scale: all exponents, all halfway cases."""
    top = torch.arange(2**16) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001])
    bits = top[:, None] + low - (1 << 31)
    scale = bits.flatten().to(torch.int32).view(torch.float32)
    ones = torch.ones(scale.numel(), 1, dtype=torch.int8)
    got = OPS.dequantize(ones, scale, -1, dtype)
    assert_same(got, scale.to(dtype)[:, None])
    wide = OPS.dequantize(torch.ones(200, 33, dtype=torch.int8), scale[::3277], -1, dtype)
    assert_same(wide, scale[::3277].to(dtype)[:, None].expand(200, 33))


def test_groups_and_layouts(isa):
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    for group_size in (1, 3, 32, 48, 96):
        codes, scale = OPS.quantize(x, 4, group_size)
        assert scale.shape == (3, 5, 96 // group_size)
        want_codes, want_scale = expected_quantize(x.unflatten(-1, (-1, group_size)), 4, False)
        assert_same(codes, want_codes.flatten(-2))
        assert_same(scale, want_scale)
        assert_same(
            OPS.dequantize(codes, scale, group_size, torch.float32),
            OPS.fake_quantize(x, 4, group_size),
        )
    dense, _ = OPS.quantize(x, 8)
    shifted = torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape)
    assert shifted.storage_offset() == 1
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), shifted, x.flip(0).flip(0)):
        assert_same(OPS.quantize(view, 8)[0], dense)
    strided = torch.stack((x, -x), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert_same(OPS.quantize(strided, 8)[0], dense)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_empty(isa, shape):
    x = torch.empty(shape)
    codes, scale = OPS.quantize(x, 8)
    assert codes.shape == x.shape and torch.equal(scale, torch.ones(shape[:-1]))
    assert OPS.dequantize(codes, scale, -1, torch.bfloat16).shape == x.shape
    assert OPS.fake_quantize(x, 8).shape == x.shape
    assert OPS.fake_quantize_backward(x, x, 2.0).shape == x.shape
    assert OPS.unpack_int4(OPS.pack_int4(codes), shape[-1]).shape == x.shape


def test_threads_do_not_change_bits(isa):
    x = torch.randn(512, 1000, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = (*OPS.quantize(x, 8), OPS.fake_quantize(x, 4))
        torch.set_num_threads(2)
        two = (*OPS.quantize(x, 8), OPS.fake_quantize(x, 4))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_backward_mask(isa, dtype):
    x = torch.tensor([-2.5, -2.0, -1.99, 0.0, 1.99, 2.0, 3.0, float("inf"), float("nan")]).to(dtype)
    grad = torch.arange(1, 10).to(dtype)
    assert_same(OPS.fake_quantize_backward(grad, x, None), grad)
    assert_same(OPS.fake_quantize_backward(grad, x, 2.0), spec.fake_quantize_backward(grad, x, 2.0))
    for clip in (0.0, -1.0, 1.9900001, 2.0000002, 1e30, 1e-30, float("inf"), float("nan")):
        want = spec.fake_quantize_backward(grad, x, clip)
        assert_same(OPS.fake_quantize_backward(grad, x, clip), want)
    kept = OPS.fake_quantize_backward(grad, x, 2.0) != 0
    assert kept.tolist() == [False, False, True, True, True, False, False, False, False]


def test_int4_every_byte(isa):
    every = torch.arange(256).to(torch.uint8).reshape(1, 256)
    codes = OPS.unpack_int4(every, 512)
    low, high = every.int() & 15, every.int() >> 4
    want = torch.stack((low, high), dim=-1).flatten(-2)
    assert_same(codes.int(), torch.where(want > 7, want - 16, want))
    assert_same(OPS.pack_int4(codes), every)
    for length in LENGTHS:
        rows = torch.randint(-8, 8, (3, length), dtype=torch.int8)
        packed = OPS.pack_int4(rows)
        assert packed.shape == (3, (length + 1) // 2)
        assert_same(OPS.unpack_int4(packed, length), rows)
        if length % 2:
            assert (packed[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: OPS.quantize(torch.ones(2, 4), 1), "bits: expected 2 to 8, got 1"),
        (lambda: OPS.quantize(torch.ones(2, 4), 9), "bits: expected 2 to 8, got 9"),
        (lambda: OPS.quantize(torch.ones(2, 4), 8, 3), "group_size: 3 does not divide"),
        (lambda: OPS.quantize(torch.ones(2, 4), 8, 0), "group_size: expected -1 or a positive"),
        (lambda: OPS.quantize(torch.ones(()), 8), "x: expected at least 1 dimensions"),
        (lambda: OPS.quantize(torch.ones(2, 4).double(), 8), "x: expected float32, bfloat16"),
        (lambda: OPS.dequantize(torch.ones(2, 4), torch.ones(2), -1, torch.float32), "codes: exp"),
        (
            lambda: OPS.dequantize(
                torch.ones(2, 4, dtype=torch.int8), torch.ones(3), -1, torch.float32
            ),
            "scale: expected the shape of codes",
        ),
        (lambda: OPS.pack_int4(torch.ones(2, 4)), "codes: expected int8, got float32"),
        (lambda: OPS.unpack_int4(torch.ones(2, 4, dtype=torch.uint8), 9), "columns: 9 does not"),
        (
            lambda: OPS.fake_quantize_backward(torch.ones(2), torch.ones(3), None),
            "grad: expected the shape of x",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.parametrize("namespace", ["llmqat_cpu", "llmqat_cuda"])
def test_schemas_are_the_list_of_schemas_py(namespace):
    registered = {
        schema.name.partition("::")[2]: schema
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(f"{namespace}::")
    }
    if namespace == "llmqat_cuda" and native.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    assert "quantize" in registered
    for op in registered.keys() - LIBRARY_OPS - INNER_OPS:
        assert op in SCHEMAS, f"{namespace}::{op} is not in schemas.py"
        want = torch._C.parse_schema(f"{namespace}::{op}{SCHEMAS[op]}")
        assert str(registered[op]) == str(want)
        key = "CPU" if namespace == "llmqat_cpu" else "CUDA"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key)


def test_set_isa_nests_and_restores():
    before = native.isa()
    with native.set_isa("scalar"):
        assert native.isa() == "scalar"
        with native.set_isa(native.supported_isas()[-1]):
            assert native.isa() == native.supported_isas()[-1]
        assert native.isa() == "scalar"
    assert native.isa() == before
    with pytest.raises(BackendUnavailable, match="isa: 'neon' cannot"), native.set_isa("neon"):
        pass
    assert native.isa() == before


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_selects_the_isa_and_turns_the_library_off():
    show = "from llmqat_kernels import native; print(native.isa(), native.why_not())"
    assert run_python(show, LLMQAT_CPU_ISA="scalar").stdout.split()[0] == "scalar"
    unknown = run_python(show, LLMQAT_CPU_ISA="sse9")
    assert unknown.returncode != 0
    assert "LLMQAT_CPU_ISA=sse9: choose one of scalar, avx2, avx512vnni" in unknown.stderr
    assert run_python(show, LLMQAT_NATIVE="0").stdout.startswith("none LLMQAT_NATIVE=0")


def test_host_module_agrees_with_the_library():
    host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")
    assert json.loads(host.build_info()) == native.build_info()
    assert host.detected_isa() == native.supported_isas()[-1]
    assert host.rows_per_task(64) == 1024 and host.rows_per_task(10**9) == 1
    threads = [host.quantize_threads(n, 8) for n in (0, 1, 256, 257, 2048, 10**6)]
    assert threads == [32, 32, 32, 64, 256, 256]
    alone = run_python(
        "import importlib.util as u, sys;"
        f"s = u.spec_from_file_location('_host', {host.__file__!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(*sys.modules)"
    )
    assert "sys" in alone.stdout.split() and "torch" not in alone.stdout.split()
