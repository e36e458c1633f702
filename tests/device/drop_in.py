"""`llmqat_kernels.nn` in a training loop that knows no model family."""

from __future__ import annotations

import torch
from torch import nn

from llmqat_kernels import nn as qnn
from llmqat_kernels import use_backend
from llmqat_kernels.testing import assert_same_bits
from tests.device.registry import flow

W4A8 = qnn.LinearBits(4, 8)
HEAD_DIM, SIZE, HIDDEN = 64, 128, 192
FORWARD, BACKWARD = 0.02, 0.02
"""Relative, of the norm: compiled code may round a sum of bf16 once where torch rounds twice."""
KERNELS = {
    "rms_norm_quantize_kernel", "int8_matmul_kernel", "rope_fake_quantize_kernel",
    "silu_mul_quantize_kernel", "silu_mul_backward_kernel", "float_matmul_codes_kernel",
    "rms_norm_backward_kernel", "rms_norm_kernel",
}  # fmt: skip


def linear(k, n):
    """Without a bias."""
    return qnn.QATLinear(k, n, bits=W4A8, bias=False)


class Block(nn.Module):
    """Every module of the package once."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (qnn.QuantizedRMSNorm(SIZE, W4A8) for _ in range(2))
        self.q, self.k, self.v, self.o = (linear(SIZE, SIZE) for _ in range(4))
        self.kv = qnn.QuantizedKV(HEAD_DIM, bits=8)
        self.mlp = qnn.QuantizedSwiGLU(
            linear(SIZE, HIDDEN), linear(SIZE, HIDDEN), linear(HIDDEN, SIZE)
        )
        self.last = qnn.RMSNorm(SIZE)

    def forward(self, x, cos, sin):
        """x [B, T, SIZE], tables [1, T, HEAD_DIM / 2] -> [B, T, SIZE]."""
        rows, stream = self.first(x)
        heads = self.kv(self.q(rows), self.k(rows), self.v(rows), cos, sin)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        rows, stream = self.second(self.o(mixed.transpose(1, 2).flatten(2)), stream)
        return self.last(stream + self.mlp(rows))


def block():
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Block()


def inputs():
    """Two sequences of five tokens and the tables of RoPE."""
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(8))
    angles = torch.outer(torch.arange(5), 10000 ** (-torch.arange(HEAD_DIM / 2) * 2 / HEAD_DIM))
    return [t.to("cuda") for t in (x, angles.cos()[None], angles.sin()[None])]


def step(module, parameters, x, cos, sin):
    """Output and gradients of one step under autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x, cos, sin)
        loss = (y.float() * torch.arange(SIZE, device=y.device).sin()).sum()
    return y.detach(), torch.autograd.grad(loss, parameters)


def near(got, expected, bound, what):
    """By the norm of the difference."""
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < bound, (what, error)


@flow()
def modules_under_autocast_and_compiled(place):
    """Forward bit for bit, gradients by the rounding of bf16; then the same through the compiler,
    without a break of the graph.
    """
    with place.device():
        module = block().to("cuda")
        names, parameters = zip(*module.named_parameters(), strict=True)
        with use_backend("reference"):
            expected, wanted = step(module, parameters, *inputs())
        module.train(False).train()  # which forgets the codes of the weights
        with use_backend("triton"):
            y, gradients = step(module, parameters, *inputs())
            assert KERNELS <= place.ran, KERNELS - place.ran
            assert_same_bits(y, expected)
            compiled = step(place.compiled(module), parameters, *inputs())
        assert expected.dtype == torch.bfloat16
        near(compiled[0], y, FORWARD, "compiled")
        for name, *three in zip(names, gradients, compiled[1], wanted, strict=True):
            near(three[0], three[2], BACKWARD, name)
            near(three[1], three[0], BACKWARD, f"compiled {name}")
