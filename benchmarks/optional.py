"""Baselines from other packages, where they are installed; imported when a row asks for them.

Each function returns a call on the row's tensors. A package that is missing, or whose interface
has changed, raises: the runner names it with the reason and leaves the baseline out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("torchao", "liger-kernel", "gemlite", "humming-kernels")


def versions() -> dict[str, str]:
    """Package -> its version or ``not installed``."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def torchao_fake_quantizer(bits: int) -> Callable[[Tensor], Tensor]:
    """torchao's fake quantization of every row, symmetric."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    dtype = {4: torch.int4, 8: torch.int8}[bits]
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True))


def torchao_fake_quantize(x: Tensor, bits: int) -> Callable[[], Tensor]:
    """Forward only."""
    module = torchao_fake_quantizer(bits)
    return lambda: module(x)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def torchao_int8(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Dynamic int8 activations times int8 weights, compiled as torchao's users run it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(_linear(weight))
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, config)
    fast = torch.compile(model, dynamic=False, mode="max-autotune-no-cudagraphs")
    return _without_gradient(fast, x)


def gemlite_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Callable[[], Tensor]:
    """gemlite's W8A8: per-token activations, per-channel weights on the row's own codes."""
    return _without_gradient(gemlite_layer(codes, scale, 8, x.dtype), x)


def gemlite_int4(x: Tensor, codes: Tensor, scale: Tensor) -> Callable[[], Tensor]:
    """gemlite's W4A8 with int8 activations, on the row's own codes."""
    return _without_gradient(gemlite_layer(codes, scale, 4, x.dtype), x)


def gemlite_layer(
    codes: Tensor, scale: Tensor, w_bits: int, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """gemlite's linear with dynamic int8 activations on codes int8 [N, K] and scales [N]."""
    from gemlite.helper import A8W4_HQQ_INT_dynamic, A8W8_int8_dynamic

    device, column = str(codes.device), scale.unsqueeze(1)
    if w_bits == 8:
        return A8W8_int8_dynamic(device=device, dtype=dtype).from_weights(  # type: ignore[no-any-return]
            codes, scales=column
        )
    make = A8W4_HQQ_INT_dynamic(device=device, dtype=dtype, fp8=torch.int8)
    return make.from_weights(  # type: ignore[no-any-return]
        (codes + 8).to(torch.uint8), column, torch.full_like(column, 8)
    )


def humming(x: Tensor, weight: Tensor, w_bits: int) -> Callable[[], Tensor]:
    """humming's linear with int8 activations; it quantizes the weight on its own grid."""
    return _without_gradient(humming_layer(weight, w_bits, "int8"), x)


def humming_layer(weight: Tensor, w_bits: int, a_type: str) -> Callable[[Tensor], Tensor]:
    """humming's linear, quantized from ``weight`` [N, K] on its own grid; ``a_type`` ``int8``,
    ``int4`` or ``bfloat16``: what it makes of its input, inside.
    """
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weight.shape[0],
        shape_k=weight.shape[1],
        weight_config={"dtype": f"int{w_bits}"},
        input_config={"dtype": a_type},
        torch_dtype=weight.dtype,
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer  # type: ignore[no-any-return]


def _without_gradient(function: Callable[..., Any], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(x)

    return run


def liger_distillation(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Liger's fused linear KL, forward and backward, fed with the teacher's probabilities, which
    are computed from its head in every call.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    def probabilities() -> Tensor:
        with torch.no_grad():
            # One pass from logits to fp32 probabilities, without fp32 logits in between.
            return torch.softmax(teacher @ teacher_head.T, -1, dtype=torch.float32)

    # KL plus the teacher's entropy is the cross entropy; it has no gradient and costs nothing here.
    p = probabilities()
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean()
    del p

    def run() -> tuple[Tensor, ...]:
        loss = liger_fused_linear_kl_div(student, student_head, probabilities())
        return loss + entropy, *torch.autograd.grad(loss, (student, student_head))

    return run
