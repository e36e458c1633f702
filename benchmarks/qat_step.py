"""One QAT step: the integer forward of `QATLinear` against forwards in float.

    python -m benchmarks.qat_step [--model DIR] [--gradient-checkpointing] [--rounds 5] [--save]

Same model (the shapes of SmolLM2-135M), weights, data, teacher, loss and optimizer; only the seven
linears of a block differ, and they take turns on the same parameters. Three forwards:

* integer: int8 codes times int8 codes, exact; int8 codes are kept for backward (spec 7);
* float: `F.linear` of fake-quantized operands, the quantizer in plain torch operations, as QAT code
  usually is;
* fused: the same with this package's one-pass `fake_quantize`.

The gate comes first: nothing is timed unless outputs, gradients and losses agree. Bar: the whole
step (teacher, forward, loss, backward, AdamW), integer over float, at most 0.85; the ratio to
fused is reported beside it. Without `--model` the weights are random, which changes no cost.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import llmqat
import llmqat_kernels as qk  # first: sets passive OpenMP waiting before torch loads
from benchmarks.timing import environment, save, summary
from llmqat.nn import QATLinear

BAR = 0.85
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PHASES = ("teacher", "forward", "loss", "backward", "optimizer")
LAYER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative norm of the difference of outputs and gradients of one layer."""
LOSS_TOLERANCE = 0.02


class _EagerFakeQuantize(torch.autograd.Function):
    """Min-max fake quantization per row with a straight-through gradient, one torch operation
    after the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, bf16_scale: bool) -> Tensor:
        qmax = 2 ** (bits - 1) - 1
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
        scale = scale / torch.full_like(scale, qmax)
        if bf16_scale:
            scale = scale.bfloat16().float()
        inverse = torch.ones_like(scale) / scale
        return (torch.clamp(x.float() * inverse, -qmax, qmax).round() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


class FloatLinear(QATLinear):
    """The float forward; parameters and settings are those of the QATLinear it stands in for."""

    def quantize_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bf16_scale = self.spec.scale_dtype == torch.bfloat16
        weight = _EagerFakeQuantize.apply(self.weight, self.spec.weight.bits, bf16_scale)
        return _EagerFakeQuantize.apply(x, self.spec.activation.bits, False), weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        x, weight = self.quantize_operands(x)
        return F.linear(x, weight.to(x.dtype), self.bias)


class FusedFloatLinear(FloatLinear):
    """The same with the one-pass quantizer of this package."""

    def quantize_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        weight = qk.fake_quantize(self.weight, spec.weight.bits, scale_dtype=spec.scale_dtype)
        return qk.fake_quantize(x, spec.activation.bits), weight


VARIANTS: dict[str, type[QATLinear]] = {
    "integer": QATLinear,
    "float": FloatLinear,
    "fused": FusedFloatLinear,
}


def use(model: nn.Module, variant: str) -> None:
    """Give every quantized linear of `model` the forward of `variant`."""
    for module in model.modules():
        if isinstance(module, QATLinear):
            module.__class__ = VARIANTS[variant]


def random_model(seed: int) -> LlamaForCausalLM:
    """Random weights in the shapes of SmolLM2-135M."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class Step:
    """A whole training step on fixed data, timed by phase."""

    def __init__(
        self,
        model: str | None,
        setting: str,
        batch: int,
        length: int,
        dtype: torch.dtype,
        clock: str,
        checkpointing: bool,
    ) -> None:
        def load(dtype: torch.dtype) -> nn.Module:
            return (
                random_model(0).to(dtype)
                if model is None
                else llmqat.from_pretrained(model, dtype=dtype)
            )

        self.dtype = dtype
        self.clock = CLOCKS[clock]
        self.teacher = load(dtype).eval().requires_grad_(False)
        self.student = load(torch.float32).train()
        llmqat.prepare(self.student, llmqat.QATConfig.parse(setting, kv_mode="serving"))
        if checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        # So small that every step does the same work on practically the same weights.
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=1e-9, weight_decay=0.0, fused=True
        )
        vocab = self.student.config.vocab_size
        self.ids = torch.randint(
            20, vocab, (batch, length), generator=torch.Generator().manual_seed(1)
        )

    def run(self, variant: str) -> tuple[float, dict[str, float]]:
        """The loss, and seconds by phase."""
        use(self.student, variant)
        marks = [self.clock()]

        def mark() -> None:
            marks.append(self.clock())

        with torch.no_grad():
            teacher_hidden = self.teacher.model(self.ids, use_cache=False).last_hidden_state
        mark()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.student.model(self.ids, use_cache=False).last_hidden_state.to(self.dtype)
        mark()
        head = self.student.lm_head.weight.to(self.dtype)
        loss = qk.distillation_loss(hidden, head, teacher_hidden, self.teacher.lm_head.weight)
        mark()
        loss.backward()
        mark()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()
        spans = [end - begin for begin, end in pairwise(marks)]
        return loss.item(), dict(zip(PHASES, spans, strict=True))

    def inputs(self, prefix: str) -> dict[str, Tensor]:
        """What the linears below `prefix` receive in the integer forward, by full name."""
        use(self.student, "integer")
        found: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, n=name: found.update({n: args[0]}))
            for name, module in self.student.named_modules()
            if isinstance(module, QATLinear) and name.startswith(prefix)
        ]
        with torch.no_grad():
            self.student.model(self.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return {name: x.to(self.dtype) for name, x in found.items()}

    def results(self, variant: str, name: str, x: Tensor) -> list[Tensor]:
        """Output, input gradient and weight gradient of one linear, for a fixed output gradient."""
        use(self.student, variant)
        linear = self.student.get_submodule(name)
        x = x.detach().requires_grad_()
        y = linear(x)
        generator = torch.Generator().manual_seed(2)
        grads = torch.autograd.grad(
            y, (x, linear.weight), torch.randn(y.shape, generator=generator).to(y.dtype)
        )
        return [tensor.detach().float() for tensor in (y, *grads)]


def gate(step: Step) -> dict[str, float]:
    """The variants compute the same thing, or SystemExit; returns the largest differences seen.

    Layer by layer on the same inputs, because whole models drift apart: the last bit of a rounded
    sum moves an activation across a rounding boundary now and then.
    """
    worst = {"layer": 0.0, "loss": 0.0}
    tolerance = LAYER_TOLERANCE[step.dtype]
    for name, x in step.inputs("model.layers.7.").items():
        expected = step.results("integer", name, x)
        for variant in ("float", "fused"):
            for want, got in zip(expected, step.results(variant, name, x), strict=True):
                error = float((want - got).norm() / want.norm())
                worst["layer"] = max(worst["layer"], error)
                if not error <= tolerance:
                    raise SystemExit(f"gate: {variant} {name} differs by {error:.2e} > {tolerance}")
    losses = {variant: step.run(variant)[0] for variant in VARIANTS}
    for variant, loss in losses.items():
        error = abs(loss / losses["integer"] - 1)
        worst["loss"] = max(worst["loss"], error)
        if not error <= LOSS_TOLERANCE:
            raise SystemExit(f"gate: {variant} has loss {loss}, integer {losses['integer']}")
    return worst


def measure(step: Step, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Interleaved rounds: variant -> phase (and "step") -> p50, p20, p80 in seconds."""
    seconds: dict[str, dict[str, list[float]]] = {
        v: {p: [] for p in (*PHASES, "step")} for v in VARIANTS
    }
    for index in range(rounds + 1):
        for variant in VARIANTS:
            _, spans = step.run(variant)
            if index:  # the first round warms up
                for phase, span in spans.items():
                    seconds[variant][phase].append(span)
                seconds[variant]["step"].append(sum(spans.values()))
    return {
        v: {p: summary(values) for p, values in phases.items()} for v, phases in seconds.items()
    }


def table(times: dict[str, dict[str, dict[str, float]]]) -> str:
    """Milliseconds by phase, and the ratio integer / other."""
    lines = [
        f"{'phase':<10}"
        + "".join(f"{v:>12}" for v in times)
        + f"{'int/float':>12}{'int/fused':>12}"
    ]
    for phase in (*PHASES, "step"):
        medians = [times[v][phase]["p50"] for v in times]
        cells = "".join(f"{1e3 * m:>10.0f}ms" for m in medians)
        lines.append(
            f"{phase:<10}{cells}{medians[0] / medians[1]:>12.3f}{medians[0] / medians[2]:>12.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Gate, measure, print; with --save write `results/qat_step*.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="folder of SmolLM2-135M; random weights of its shape otherwise"
    )
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--tokens", default="2x256", help="sequences x length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="cpu: processor seconds, for a machine that is not quiet",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batch, length = map(int, args.tokens.split("x"))
    step = Step(
        args.model,
        args.bits,
        batch,
        length,
        getattr(torch, args.dtype),
        args.clock,
        args.gradient_checkpointing,
    )
    agreement = gate(step)
    times = measure(step, args.rounds)
    ratios = {
        v: times["integer"]["step"]["p50"] / times[v]["step"]["p50"] for v in ("float", "fused")
    }
    result = {
        "what": "QAT step, seconds by phase",
        "bits": args.bits,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "clock": args.clock,
        "gradient_checkpointing": args.gradient_checkpointing,
        "weights": "random" if args.model is None else "SmolLM2-135M",
        "gate": agreement,
        "seconds": times,
        "ratio": ratios,
        "bar": BAR,
        "passes": ratios["float"] <= BAR,
    }
    if args.save:
        name = f"qat_step_{args.dtype}" + ("_checkpointing" if args.gradient_checkpointing else "")
        save(name, result)
    print(json.dumps({"environment": environment(), **result}) if args.json else table(times))


if __name__ == "__main__":
    main()
