"""Training by the package's loop: activation checkpointing, accumulation of gradients, AdamW."""

from __future__ import annotations

import copy
import tempfile

import torch

import llmqat
from llmqat.nn import QATLinear
from llmqat_kernels import nn as qnn
from llmqat_kernels import use_backend
from llmqat_kernels.testing import assert_same_bits
from tests.device.registry import flow
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import build_trainer

FIRST = {False: 1e-5, True: 1e-3}
"""Bf16 or not -> relative: the first loss comes of the same codes. Only the sums of the head's
product and softmax may be taken in another order; bf16 rounds logits."""
STEP, END = 0.05, 0.02
"""Relative: a loss after the first one, and the mean of the last quarter. Sums of gradients round
differently on two backends. Until a code flips by that, losses agree to 1e-7; from there on a step
differed by up to 3.3 % and the end by up to 1.1 % when, on one backend, gradients were changed by a
part in 10^5 (fp32), in 10^4 or by one unit (bf16), each with five seeds."""
GRADIENT = {False: 1e-4, True: 0.02}
"""Bf16 or not -> relative, of the norm of a parameter's gradient."""
INTEGER = {"group_size": 16, "weight_scale_dtype": "integer"}
KERNELS = {"float_matmul_codes_kernel", "soft_cross_entropy_kernel"}
FUSED_KERNELS = {
    "rms_norm_quantize_kernel", "rms_norm_backward_kernel", "rope_kernel",
    "rope_fake_quantize_kernel", "silu_mul_quantize_kernel", "silu_mul_backward_kernel",
}  # fmt: skip


@flow("fp32")
@flow("bf16", bf16=True)
@flow("fused-fp32", fused=True)
@flow("fused-bf16", fused=True, bf16=True)
@flow("fused-integer-scales", fused=True, share=0.5, **INTEGER)
def training(place, *, fused=False, bf16=False, share=1, **fields):
    """The Triton backend trains what the reference trains on the same device, and on the CPU."""
    config = llmqat.QATConfig.parse("4-8-4", kv_mode="serving", **fields)

    def losses(device, backend, steps):
        trainer = train(place, device, backend, config, steps, fused=fused, bf16=bf16)
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    _, on_cpu = losses("cpu", "reference", 1)
    with place.device():
        steps = int(share * place.steps)
        _, expected = losses("cuda", "reference", steps)
        trainer, got = losses("cuda", "triton", steps)
        product = "integer_group_matmul_kernel" if fields else "int8_matmul_kernel"
        wanted = {product} | KERNELS | (FUSED_KERNELS if fused else set())
        assert wanted <= place.ran, wanted - place.ran
        near = 1e-4 if place.exact else STEP
        assert abs(expected[0] / on_cpu[0] - 1) < near, (expected, on_cpu)
        same_curve(got, expected, FIRST[bf16])
        student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        assert all(parameter.is_cuda for parameter in student.parameters())
        same_integers(student, bf16)
        same_gradients(student, bf16)


def train(place, device, backend, config, steps, *, fused, bf16):
    """The trainer of a student of a tiny teacher, when it has ended."""
    teacher = tiny_llama(3, **place.size, tied=True)
    student = llmqat.prepare(copy.deepcopy(teacher), config, fused=fused)
    data = [{"input_ids": row} for row in random_tokens(1, 4, place.length)] * place.steps
    with tempfile.TemporaryDirectory() as folder, use_backend(backend):
        trainer = build_trainer(
            folder, steps=steps, student=student, teacher=teacher, data=data,
            use_cpu=device == "cpu", bf16=bf16, learning_rate=3e-4, health_steps=steps,
            gradient_checkpointing=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
    return trainer


def same_curve(got, expected, first):
    """Losses of one training on two backends; with more than a few steps, it learns."""
    pairs = list(zip(got, expected, strict=True))
    assert abs(got[0] / expected[0] - 1) < first, pairs
    assert all(abs(a / b - 1) < STEP for a, b in pairs), pairs
    last = max(1, len(pairs) // 4)
    a, b = sum(got[-last:]), sum(expected[-last:])
    assert abs(a / b - 1) < END, pairs
    assert len(pairs) < 10 or a / last < 0.95 * got[0], pairs


def on_both(function, student, bf16):
    """``function(student, tokens)`` on the Triton backend and on the reference."""
    results = []
    for backend in ("triton", "reference"):
        for layer in linears(student).values():
            layer.clear_cache()
        tokens = random_tokens(2, 2, 16).to("cuda")
        with use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            results.append(function(student, tokens))
    return results


def linears(model):
    """Name -> quantized linear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QATLinear)}


def same_integers(student, bf16):
    """Codes, scales, int32 sums and outputs of every linear, bit for bit; then the logits."""
    got, expected = on_both(integers, student, bf16)
    assert set(got) == set(expected) == {*linears(student), "logits"}
    for name, parts in expected.items():
        for part, want in parts.items():
            assert_same_bits(got[name][part], want, f"{name}: {part}")


@torch.no_grad()
def integers(model, tokens):
    """What every linear reads, multiplies and gives in one forward."""
    parts = {}

    def note(name):
        def hook(layer, inputs, output):
            rows, codes = rows_of(inputs[0], layer.bits.a_bits), layer.weight_codes()
            sums = torch.ops.llmqat.int_matmul(rows.codes, codes[0], layer.bits.w_bits)
            parts[name] = {
                "codes": rows.codes, "scales": rows.scale, "weight's codes": codes[0],
                "weight's scales": codes[1], "sums": sums, "output": output,
            }  # fmt: skip

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in linears(model).items()]
    parts["logits"] = {"": model.eval()(tokens, use_cache=False).logits}
    for hook in hooks:
        hook.remove()
    return parts


def rows_of(x, bits):
    """The codes of a linear's input, whatever form it comes in."""
    if isinstance(x, torch.Tensor):
        return qnn.QuantizedRows.quantize(x, bits)
    return x.quantize(bits) if isinstance(x, qnn.GatedRows) else x


def same_gradients(student, bf16):
    """Of every parameter, through recomputed activations."""
    got, expected = on_both(gradients, student, bf16)
    for name, want in expected.items():
        error = ((got[name] - want).norm() / want.norm()).item()
        assert error < GRADIENT[bf16], (name, error)


def gradients(model, tokens):
    """Of the mean square of the logits."""
    model.train().zero_grad()
    assert model.is_gradient_checkpointing
    model(tokens, use_cache=False).logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
