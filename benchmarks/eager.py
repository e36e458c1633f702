"""The ops in plain torch operations, one after the other, as a user writes them without this
package. Baselines only: not bit-exact, and no test relies on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric min-max codes and scale of every row."""
    qmax = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-20) / qmax
    return torch.clamp(torch.round(x / scale), -qmax, qmax).to(torch.int8), scale.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale``."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """Round trip with a straight-through gradient, by the detach idiom of QAT code."""
    qmax = 2 ** (bits - 1) - 1
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-20) / qmax
    rounded = torch.clamp(torch.round(x / scale), -qmax, qmax) * scale
    return x + (rounded - x).detach()


def fake_quantize_channels(x: Tensor, bits: int, group_size: int) -> Tensor:
    """One scale per group of columns over all rows [R, C]."""
    qmax = 2 ** (bits - 1) - 1
    groups = x.reshape(x.shape[0], -1, group_size)
    scale = groups.abs().amax((0, 2), keepdim=True).clamp(min=1e-20) / qmax
    return (torch.clamp(torch.round(groups / scale), -qmax, qmax) * scale).reshape(x.shape)


def fake_quantize_affine(x: Tensor, bits: int) -> Tensor:
    """Min-max scales in plain torch, then torch's fused per-channel fake quantization (fp32)."""
    qmax = 2 ** (bits - 1) - 1
    scale = x.detach().abs().amax(-1).clamp(min=1e-20) / qmax
    zero = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -qmax, qmax)


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte."""
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Sign-extended nibbles, by shifts."""
    low = (packed << 4).view(torch.int8) >> 4
    return torch.stack((low, packed.view(torch.int8) >> 4), dim=-1).flatten(-2)


def int_mm(a: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch._int_mm`` and the rescaling; ``scale`` is the scales' outer product."""
    return (torch._int_mm(a, w.T).float() * scale).to(dtype)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, bits: int) -> tuple[Tensor, Tensor]:
    """``F.rms_norm``, then quantize."""
    return quantize(F.rms_norm(x, (x.shape[-1],), weight, eps), bits)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``F.silu(gate) * up``, then quantize."""
    return quantize(F.silu(gate) * up, bits)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as modelling code writes it: x [..., D], cos and sin [..., D / 2]."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def distillation_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    """Soft cross entropy by ``F.cross_entropy`` with probabilities; all logits at once."""
    teacher = F.softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return F.cross_entropy((student_hidden @ student_head.T).float(), teacher)


def kl_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    """``F.kl_div`` plus the teacher's entropy, which has no gradient; all logits at once."""
    teacher = F.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    student = F.log_softmax((student_hidden @ student_head.T).float(), -1)
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) + entropy


def top_k_loss(
    student_hidden: Tensor, head: Tensor, probabilities: Tensor, tokens: Tensor
) -> Tensor:
    """Soft cross entropy against stored probabilities; all logits at once."""
    student = F.log_softmax((student_hidden @ head.T).float(), -1)
    return -(probabilities.float() * student.gather(-1, tokens)).sum(-1).mean()


def logits_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Soft cross entropy of logits that exist already."""
    return F.cross_entropy(student_logits.float(), F.softmax(teacher_logits.float(), -1))


def rope_fake_quantize(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bits: int, pre_rope: bool
) -> tuple[Tensor, Tensor]:
    """k, v [n, Hkv, D] as attention reads them; cos, sin [n, 1, D / 2] of the tokens."""

    def quantized(x: Tensor) -> Tensor:
        return (
            fake_quantize(x.flatten(1), bits).view(x.shape) if pre_rope else fake_quantize(x, bits)
        )

    if pre_rope:
        return rotate(quantized(k), cos, sin), quantized(v)
    return quantized(rotate(k, cos, sin)), quantized(v)


def integer_groups(
    a: Tensor, w: Tensor, multiplier: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The product by one ``torch._int_mm`` a group; ``scale`` is the scales' outer product."""
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32, device=a.device)
    for group in range(multiplier.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        part = torch._int_mm(a[:, columns].contiguous(), w[:, columns].contiguous().T)
        total += part * multiplier[:, group].int()
    return (total.float() * scale).to(dtype)


class PaperFakeQuantize(torch.autograd.Function):
    """The paper's quantizer (LLM-QAT Eq. 3), one torch operation after the other in the tensor's
    own dtype, straight-through: the leanest spelling, 18 bytes a bf16 value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        alpha = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / (2 ** (bits - 1) - 1)
        return torch.round(x / alpha) * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class PublishedFakeQuantize(torch.autograd.Function):
    """The same as QAT code is commonly published: a guarded divisor for every value, and no
    gradient outside a clip range. 32 bytes a bf16 value forward, 14 backward.
    """

    CLIP = 2.5
    GUARD = 1e-6

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        largest = x.abs().amax(-1, keepdim=True).expand_as(x)
        steps = (2 ** (bits - 1) - 1) / (largest + PublishedFakeQuantize.GUARD)
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        outside = (x >= PublishedFakeQuantize.CLIP) | (x <= -PublishedFakeQuantize.CLIP)
        return grad.masked_fill(outside, 0), None


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def compiled(function: Callable[..., Any], mode: str | None = MAX_AUTOTUNE) -> Callable[..., Any]:
    """``torch.compile`` of a function of tensors, at the sizes it is called with; an error where a
    part of it would run eagerly. Compiling is part of the first call.

    ``mode`` None is torch's default, which leaves matrix products to cuBLAS.
    """
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
