"""Entries of the linears: y[M, N] = x[M, K] @ w[N, K].T on quantized and float weights.

Floors: the weight at its stored width, its scales, activations and result once; 2MNK operations
(int8 where both sides are codes, floating-point elsewhere; a backward pass has 4MNK).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager, optional
from benchmarks.entry import (
    Call,
    Cost,
    Entry,
    Grid,
    Job,
    Shape,
    nbytes,
    normal,
    on_reference,
    same_bits,
    within_ratio,
)
from llmqat_kernels import dispatch
from llmqat_kernels.testing import assert_same_bits

ops = torch.ops.llmqat
FLOATS = (torch.float32, torch.bfloat16)
BF16 = (torch.bfloat16,)
GRADIENTS = ("qat_matmul_backward_input", "qat_matmul_backward_weight")
"""Operators for which `llmqat_kernels.use_composed` is a real alternative: torch's product reads
2 bytes for each of ours, and may be faster by more than that costs."""
SMOL, LLAMA = {"N": 1536, "K": 576}, {"N": 11008, "K": 4096}
SERVED = tuple(
    Shape(model, {"M": rows, **sizes})
    for model, sizes, counts in (("SmolLM2", SMOL, (1, 128)), ("LLaMA-7B", LLAMA, (1, 32)))
    for rows in counts
)
HEADS = (
    Shape("SmolLM2 head", {"M": 1, "N": 49152, "K": 576}),
    Shape("SmolLM2 head", {"M": 64, "N": 49152, "K": 576}),
)
TRAINED = (
    Shape("SmolLM2", {"M": 256, **SMOL}),
    Shape("LLaMA-7B", {"M": 64, "N": 4096, "K": 4096}),
)
LARGE = (
    Shape("LLaMA-7B", {"M": 4096, **LLAMA}),
    Shape("LLaMA-7B", {"M": 4096, "N": 4096, "K": 11008}),
    Shape("LLaMA-13B", {"M": 4096, "N": 13824, "K": 5120}),
    Shape("LLaMA-30B", {"M": 4096, "N": 17920, "K": 6656}),
)
"""Where the bars of the int8 products stand: M = 4096 of every width."""
SWEEP = tuple(Shape("LLaMA-7B", {"M": rows, **LLAMA}) for rows in (128, 512, 1024, 2048))
GPU_SERVED = Grid((*LARGE, *SWEEP), BF16)
GPU_FEW = Grid((LARGE[0], SWEEP[0], SWEEP[2]), BF16)
GPU_TRAINED = Grid((SWEEP[3], LARGE[0]), BF16)
OWN_W8A8 = "own W8A8"
TORCH_INT4_GROUP = 64
"""Group size of torch's own int4 GEMM: the largest it takes that divides K = 576."""


def operands(
    shape: Shape, dtype: torch.dtype, device: torch.device, w_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight codes int8 [N, K], weight scale."""
    x = normal(shape["M"], shape["K"], seed=0, dtype=dtype, device=device)
    return x, *qk.quantize(weight_of(shape, device), w_bits, scale_dtype=torch.bfloat16)


def weight_of(shape: Shape, device: torch.device) -> Tensor:
    return normal(shape["N"], shape["K"], seed=1, dtype=torch.float32, device=device)


def int_mm_runs(shape: Shape, device: torch.device) -> bool:
    """torch._int_mm takes any size on a CPU; on CUDA more than 16 rows and multiples of 8."""
    aligned = shape["N"] % 8 == 0 and shape["K"] % 8 == 0
    return device.type == "cpu" or (shape["M"] > 16 and aligned)


def _torch_int4(x: Tensor, codes: Tensor, scale: Tensor) -> Call | None:
    """torch's weight-only int4 GEMM on the same values, where it has a fast one (CPU, bf16)."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return None
    aten, groups = torch.ops.aten, codes.shape[1] // TORCH_INT4_GROUP
    packed = aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    grid = torch.stack((scale, torch.zeros_like(scale)), -1).to(x.dtype)
    grid = grid.expand(groups, *grid.shape).contiguous()
    return lambda: aten._weight_int4pack_mm_for_cpu(x, packed, TORCH_INT4_GROUP, grid)


def _quantized_linear(w_bits: int, a_bits: int) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        x, codes, scale = operands(shape, dtype, device, w_bits)
        dense = eager.dequantize(codes, scale, dtype)
        w = qk.pack_int4(codes) if w_bits == 4 else codes

        def call() -> Tensor:
            return qk.quantized_linear(x, w, scale, w_bits=w_bits, a_bits=a_bits)

        def user_codes() -> Tensor:
            return eager.unpack_int4(w) if w_bits == 4 else w

        def int_mm() -> Tensor:
            a, a_scale = eager.quantize(x, a_bits)
            return eager.int_mm(a, user_codes(), a_scale.unsqueeze(-1) * scale, dtype)

        baselines: dict[str, Call] = {f"F.linear {short(dtype)}": lambda: F.linear(x, dense)}
        if a_bits == 16:
            baselines["eager dequantize + F.linear"] = lambda: F.linear(
                x, eager.dequantize(user_codes(), scale, dtype)
            )
            if int4 := _torch_int4(x, codes, scale):
                baselines["torch int4 GEMM"] = int4
        elif int_mm_runs(shape, device):
            unpacking = "unpack + " if w_bits == 4 else ""
            baselines[f"eager {unpacking}quantize + torch._int_mm"] = int_mm
        others = {} if a_bits == 16 else _packages(x, codes, scale, w_bits)
        gate = same_bits(call)
        if a_bits == 16:
            slack = 1e-6 if dtype == torch.float32 else 1e-2
            gate = within_ratio(call, lambda: x.double() @ dense.double().T, slack=slack)
        return Job(call, baselines, gate, 3e-2, others)

    return build


def _packages(
    x: Tensor, codes: Tensor, scale: Tensor, w_bits: int
) -> dict[str, Callable[[], Call]]:
    """Other packages' linears on the same values, activations quantized inside."""

    def dense() -> Tensor:
        return eager.dequantize(codes, scale, x.dtype)

    found: dict[str, Callable[[], Call]] = {
        "humming": lambda: optional.humming(x, dense(), w_bits),
    }
    if w_bits == 8:
        found["torchao"] = lambda: optional.torchao_int8(x, dense())
        found["gemlite"] = lambda: optional.gemlite_int8(x, codes, scale)
    else:
        found["gemlite"] = lambda: optional.gemlite_int4(x, codes, scale)
    return found


def linear_cost(w_bits: int, a_bits: int) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        m, n, k = shape["M"], shape["N"], shape["K"]
        traffic = n * k * w_bits // 8 + 4 * n + (m * k + m * n) * nbytes(dtype)
        work = 2 * m * n * k
        return Cost(traffic, work) if a_bits == 16 else Cost(traffic, 0, work)

    return cost


def layout_of(w: Tensor, w_bits: int) -> Callable[[], Tensor]:
    """The weight in the layout of the backend in use, which differs between backends."""
    made: dict[str, Tensor] = {}

    def current() -> Tensor:
        backend = dispatch.current_backend()
        if backend not in made:
            made[backend] = qk.repack_weight(w, w_bits)
        return made[backend]

    return current


def _product(w_bits: int, repacked: bool) -> Callable[..., Job]:
    """Codes times codes, the activations quantized before: `repacked_matmul` on the kernel layout
    of a weight, or `quantized_matmul` on the weight as it is stored.
    """

    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        x, codes, scale = operands(shape, dtype, device, w_bits)
        a, a_scale = qk.quantize(x, 8)
        dense = eager.dequantize(codes, scale, dtype)
        both = a_scale.unsqueeze(-1) * scale

        def product(w: Tensor, bits: int) -> Call:
            if not repacked:
                return lambda: ops.quantized_matmul(a, a_scale, w, scale, None, bits, -1, dtype)
            layout = layout_of(w, bits)
            return lambda: qk.repacked_matmul(
                a, a_scale, layout(), scale, n=shape["N"], w_bits=bits, dtype=dtype
            )

        call = product(qk.pack_int4(codes) if w_bits == 4 else codes, w_bits)
        baselines: dict[str, Call] = {f"F.linear {short(dtype)}": lambda: F.linear(x, dense)}
        if int_mm_runs(shape, device):
            baselines["torch._int_mm + rescale (W8)"] = lambda: eager.int_mm(a, codes, both, dtype)
        if w_bits == 4 and device.type == "cuda":
            baselines[OWN_W8A8] = product(codes, 8)
        return Job(call, baselines, same_bits(call), 3e-2)

    return build


def product_cost(w_bits: int) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        m, n, k = shape["M"], shape["N"], shape["K"]
        traffic = n * k * w_bits // 8 + 4 * (n + m) + m * k + m * n * nbytes(dtype)
        return Cost(traffic, 0, 2 * m * n * k)

    return cost


def _float_matmul(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    """``dtype`` is the weight's; the activations are fp32, as in the engine's head."""
    x = normal(shape["M"], shape["K"], seed=0, dtype=torch.float32, device=device)
    w = normal(shape["N"], shape["K"], seed=1, dtype=dtype, device=device)
    layout = layout_of(w, 16)

    def call() -> Tensor:
        return qk.float_matmul(x, layout(), n=shape["N"])

    wide = w.float()
    baselines: dict[str, Call] = {"F.linear fp32": lambda: F.linear(x, wide)}
    if dtype != torch.float32:
        narrow = x.to(dtype)
        baselines[f"F.linear {short(dtype)}"] = lambda: F.linear(narrow, w)
    gate = within_ratio(call, lambda: x.double() @ w.double().T)
    return Job(call, baselines, gate, 1e-2)


def _float_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    m, n, k = shape["M"], shape["N"], shape["K"]
    return Cost(n * k * nbytes(dtype) + 4 * (m * k + m * n), 2 * m * n * k)


def _trained(shared: bool) -> Callable[..., Job]:
    """Forward and backward of `qat_linear`, or of `qat_matmul` on codes that exist already."""

    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        x = normal(shape["M"], shape["K"], seed=0, dtype=dtype, device=device).requires_grad_()
        weight = normal(shape["N"], shape["K"], seed=1, dtype=dtype, device=device)
        weight.requires_grad_()
        grad = normal(shape["M"], shape["N"], seed=2, dtype=dtype, device=device)

        def step(forward: Callable[[], Tensor]) -> Call:
            def run() -> tuple[Tensor, Tensor, Tensor]:
                y = forward()
                return y, *torch.autograd.grad(y, (x, weight), grad)

            return run

        def fused() -> Tensor:
            w = qk.fake_quantize(weight, 4, scale_dtype=torch.bfloat16)
            return F.linear(qk.fake_quantize(x, 8), w)

        baselines = {
            "eager fake_quantize + F.linear": step(
                lambda: F.linear(eager.fake_quantize(x, 8), eager.fake_quantize(weight, 4))
            ),
            "fused fake_quantize + F.linear": step(fused),
        }

        def composed() -> tuple[Tensor, Tensor, Tensor]:
            with qk.use_composed(*GRADIENTS):
                return call()

        if device.type == "cuda":
            name = f"F.linear {short(dtype)}, not quantized"
            baselines[name] = step(lambda: F.linear(x, weight))
            baselines["gradients of dequantized codes by torch"] = composed
        if shared:
            a, a_scale = qk.quantize(x.detach(), 8)
            codes, scale = qk.quantize(weight.detach(), 4, scale_dtype=torch.bfloat16)
            call = step(lambda: qk.qat_matmul(x, a, a_scale, weight, w_codes=codes, w_scale=scale))
        else:
            call = step(lambda: qk.qat_linear(x, weight, w_bits=4, a_bits=8))
        # On a CPU all backends share torch's float products; a GPU kernel sums in its own order
        # and rounds to dtype.
        strict = device.type == "cpu" or dtype == torch.float32
        gate = _gradient_gate(call, 1e-5 if strict else 1e-2)
        return Job(call, baselines, gate, 5e-2 if dtype == torch.float32 else 0.3)

    return build


def _gradient_gate(call: Call, tolerance: float) -> Callable[[], None]:
    """The output is exact; gradients are float products of equal operands."""

    def gate() -> None:
        (y, *ours), (expected, *theirs) = call(), on_reference(call)
        assert_same_bits(y.detach(), expected.detach(), "y")
        for actual, reference in zip(ours, theirs, strict=True):
            error = float((actual - reference).norm() / reference.norm())
            if not error <= tolerance:
                raise AssertionError(f"gradient differs from the reference by {error:.1e}")

    return gate


def _trained_cost(shared: bool) -> Callable[[Shape, torch.dtype], Cost]:
    """Read x, weight and the gradient, write y and two gradients; with shared codes these are what
    is read, once forward and once backward.
    """

    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        m, n, k = shape["M"], shape["N"], shape["K"]
        size = nbytes(dtype)
        inputs = 2 * (m * k + n * k) if shared else (m * k + n * k) * size
        traffic = inputs + (m * k + n * k + 2 * m * n) * size
        return Cost(traffic, 4 * m * n * k, 2 * m * n * k)

    return cost


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


ENTRIES = (
    *(
        Entry(
            "quantized_linear",
            f"W{w}A{a}",
            linear_cost(w, a),
            _quantized_linear(w, a),
            Grid(SERVED, FLOATS),
            cuda,
        )
        for w, a, cuda in ((8, 8, GPU_FEW), (4, 8, GPU_FEW), (4, 16, Grid()))
    ),
    *(
        Entry("quantized_matmul", f"W{w}A8", product_cost(w), _product(w, False), cuda=GPU_FEW)
        for w in (8, 4)
    ),
    *(
        Entry(
            "repacked_matmul",
            f"W{w}A8",
            product_cost(w),
            _product(w, True),
            Grid(SERVED, (torch.float32,)),
            GPU_SERVED,
        )
        for w in (8, 4)
    ),
    Entry("float_matmul", "", _float_cost, _float_matmul, Grid(HEADS, FLOATS)),
    Entry(
        "qat_linear",
        "W4A8, forward and backward",
        _trained_cost(False),
        _trained(False),
        Grid(TRAINED, FLOATS),
        Grid(GPU_TRAINED.shapes[:1], BF16),
    ),
    Entry(
        "qat_matmul",
        "W4A8, forward and backward",
        _trained_cost(True),
        _trained(True),
        cuda=GPU_TRAINED,
    ),
)
