"""Golden vectors of the specification: inputs and the exact outputs of `lq-1`, for any other
implementation.

`python -m tests.golden.make` adds to `lq-1.safetensors` what is new in CASES, by the spec. What is
there changes only together with a new spec version: the file is the memory of what trained
checkpoints mean. Keys are `in/<name>` and `out/<case>/<index>`; the arguments that are not tensors
are in CASES below.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.testing import generator, special_rows

PATH = Path(__file__).with_name("lq-1.safetensors")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _tables() -> dict[str, Tensor]:
    angles = torch.outer(torch.arange(8).float(), 10.0 ** -torch.arange(4).float())
    return {"cos": torch.cos(angles), "sin": torch.sin(angles)}


def make_inputs() -> dict[str, Tensor]:
    """Named inputs: the stored copies are the truth, this only made them once."""
    g = generator(2305_17888)
    w = torch.randn(24, 66, generator=g)
    inputs = {
        "rows_fp32": special_rows(66, FP32),
        "rows_bf16": special_rows(66, BF16),
        "rows_fp16": special_rows(66, FP16),
        "codes4": torch.randint(-7, 8, (24, 66), generator=g, dtype=torch.int8),
        "codes8": torch.randint(-127, 128, (24, 66), generator=g, dtype=torch.int8),
        "a": torch.randint(-127, 128, (5, 66), generator=g, dtype=torch.int8),
        "a_scale": torch.rand(5, generator=g) + 0.01,
        "w_scale": w.abs().amax(1).div(7).to(BF16).float(),
        "bias": torch.randn(24, generator=g),
        "weight": torch.randn(66, generator=g),
        "x": torch.randn(5, 66, generator=g),
        "y": torch.randn(5, 66, generator=g) * 8,
        "k": torch.randn(6, 2, 8, generator=g),
        "logits": torch.randn(6, 97, generator=g) * 3,
        "six": torch.arange(6),
        "even": torch.arange(6) % 2 == 0,
        **_tables(),
        "multiplier": torch.randint(1, 64, (24, 6), generator=g).to(torch.uint8),
    }
    return inputs


CASES: dict[str, tuple[str, tuple[object, ...]]] = {
    **{
        f"quantize_{dtype}_{bits}": ("quantize", (f"@rows_{dtype}", bits))
        for dtype in ("fp32", "bf16", "fp16")
        for bits in (2, 3, 4, 6, 8)
    },
    "quantize_bf16_scale": ("quantize", ("@rows_fp32", 4, -1, True)),
    "quantize_groups": ("quantize", ("@rows_fp32", 4, 11)),
    "quantize_integer_groups": ("quantize_integer_groups", ("@rows_fp32", 4, 11)),
    "quantize_integer_groups_bf16": ("quantize_integer_groups", ("@rows_bf16", 3, 6)),
    "fake_quantize_bf16": ("fake_quantize", ("@rows_bf16", 8)),
    "pack_int4": ("pack_int4", ("@codes4",)),
    "int_matmul": ("int_matmul", ("@a", "@codes8", 8)),
    "matmul_w8": (
        "quantized_matmul",
        ("@a", "@a_scale", "@codes8", "@w_scale", "@bias", 8, -1, FP32),
    ),
    "matmul_w4_bf16": (
        "quantized_matmul",
        ("@a", "@a_scale", "@codes4", "@w_scale", None, 4, -1, BF16),
    ),
    "linear_w4a8": ("quantized_linear", ("@x", "@codes4", "@w_scale", "@bias", 4, 8)),
    "matmul_integer_groups": (
        "integer_group_matmul",
        ("@a", "@a_scale", "@codes4", "@multiplier", "@w_scale", "@bias", 11, FP32),
    ),
    "rms_norm_quantize": ("rms_norm_quantize", ("@x", "@weight", 1e-5, 8, "@y")),
    "silu_mul_quantize": ("silu_mul_quantize", ("@y", "@x", 8)),
    "rope": ("rope", ("@k", "@cos", "@sin", "@six")),
    "sample": ("sample", ("@logits", "@six", "@six", "@even", 17)),
    "sample_top_k": ("sample", ("@logits", "@six", "@six", "@even", 17, 0.7, 10)),
}


def run_case(name: str, inputs: dict[str, Tensor], table: dict | None = None) -> tuple[Tensor, ...]:
    """Outputs of a case; `table` maps operator names to kernels (the reference by default)."""
    op, arguments = CASES[name]
    values = [inputs[a[1:]] if isinstance(a, str) else a for a in arguments]
    out = (table or REFERENCE)[op](*values)
    return out if isinstance(out, tuple) else (out,)


def main() -> None:
    """Write the file: what it holds, and what is new."""
    from safetensors.torch import load_file, save_file

    stored = load_file(PATH)
    made = {f"in/{name}": tensor.contiguous() for name, tensor in make_inputs().items()}
    tensors = {**made, **{name: tensor for name, tensor in stored.items() if name in made}}
    inputs = {name.removeprefix("in/"): tensor for name, tensor in tensors.items()}
    for name in CASES:
        for index, out in enumerate(run_case(name, inputs)):
            key = f"out/{name}/{index}"
            tensors[key] = stored.get(key, out.contiguous())
    save_file(tensors, PATH, metadata={"spec": "lq-1"})


if __name__ == "__main__":
    main()
