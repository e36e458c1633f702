"""Reference against every CPU instruction set, in bulk: codes, scales, packed bytes, accumulators;
or against the Triton backend, in many small cases of every exact operator. 0 differences is the
bar.

    python -m benchmarks.equality [--elements 50000000] [--save]
    python -m benchmarks.equality --backend triton [--cases 5500] [--save]
    python -m benchmarks.equality --backend triton --device cuda --seconds 90 [--save]

Triton runs in its interpreter, or with --device cuda on the device; its cases are those of
benchmarks/differential.py. Row inputs of the CPU's mix magnitudes, exact ties, denormals, zero, NaN
and Inf rows, in fp32, bf16 and fp16; GEMM operands include the worst case (every code at its limit)
up to K = 28,672.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks.timing import require_device, save
from llmqat_kernels import native
from llmqat_kernels.spec import int4, linear
from llmqat_kernels.spec import quantize as rows
from llmqat_kernels.testing import DTYPES, generator, special_rows, tie_row

ops = torch.ops.llmqat
COLUMNS = (64, 129, 576, 1536, 4096)


def differences(actual: Tensor, expected: Tensor) -> int:
    """Elements that are not the same value (NaN equals NaN)."""
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    return int((~same).sum())


def compare_rows(x: Tensor, bits: int, count: Counter[str]) -> None:
    """quantize, dequantize and (4 bit) packing of the rows of ``x``, scales in fp32 and in bf16."""
    count["elements"] += x.numel()
    for bf16_scale in (False, True):
        want_codes, want_scale = rows.quantize(x, bits, -1, bf16_scale)
        codes, scale = ops.quantize(x, bits, -1, bf16_scale)
        count["codes"] += differences(codes, want_codes)
        count["scales"] += differences(scale, want_scale)
        want = rows.dequantize(want_codes, want_scale, -1, x.dtype)
        count["dequantized"] += differences(ops.dequantize(codes, scale, -1, x.dtype), want)
        if bits == 4:
            count["packed bytes"] += differences(ops.pack_int4(codes), int4.pack_int4(want_codes))


def compare_matmul(k: int, bits: int, seed: int, worst: bool, count: Counter[str]) -> None:
    """Accumulators of int8 activations with ``bits``-bit weights."""
    limit, g = rows.qmax(bits), generator(seed)
    if worst:
        a = torch.full((3, k), 127, dtype=torch.int8)
        a[1, ::2] = -127
        w = torch.full((33, k), limit, dtype=torch.int8)
        w[::3] = -limit
    else:
        a = torch.randint(-127, 128, (17, k), generator=g, dtype=torch.int8)
        w = torch.randint(-limit, limit + 1, (65, k), generator=g, dtype=torch.int8)
    count["accumulators"] += differences(ops.int_matmul(a, w, bits), linear.int_matmul(a, w, bits))
    count["accumulators compared"] += a.shape[0] * w.shape[0]


def run(isa: str, elements: int) -> dict[str, int]:
    """All comparisons on one instruction set."""
    count: Counter[str] = Counter()
    with qk.use_backend("cpu"), native.set_isa(isa):
        for bits in range(2, 9):
            ties = tie_row(4096, bits) * (
                2.0 ** torch.arange(-20, 20, dtype=torch.float32)
            ).unsqueeze(1)
            compare_rows(ties, bits, count)
            count["ties"] += ties.numel() - ties.shape[0]
        for dtype in DTYPES:
            for columns in COLUMNS:
                compare_rows(special_rows(columns, dtype), 8, count)
        seed = 0
        while count["elements"] < elements:
            columns = COLUMNS[seed % len(COLUMNS)]
            x = torch.randn(1_000_000 // columns, columns, generator=generator(seed))
            x *= 10.0 ** torch.randint(-30, 30, (x.shape[0], 1), generator=generator(seed)).float()
            compare_rows(x.to(DTYPES[seed % 3]), (4, 8, 6)[seed // 3 % 3], count)
            seed += 1
        for index, k in enumerate((1, 31, 33, 1040, 1041, 4096, 11008, 28672)):
            for bits in (4, 8):
                for worst in (False, True):
                    compare_matmul(k, bits, index, worst, count)
    return dict(count)


def cpu_backend(elements: int, save_it: bool) -> int:
    """Every instruction set; the exit status."""
    results, checked = {}, ("codes", "scales", "dequantized", "packed bytes", "accumulators")
    print("| instruction set | elements | ties | accumulators | differences | seconds |")
    print("|---|---|---|---|---|---|")
    for isa in native.supported_isas():
        start = time.monotonic()
        count = run(isa, elements)
        wrong = sum(count.get(key, 0) for key in checked)
        results[isa] = {**count, "differences": wrong}
        print(
            f"| {isa} | {count['elements']:,} | {count['ties']:,} |"
            f" {count['accumulators compared']:,} | {wrong} | {time.monotonic() - start:.0f} |"
        )
    if save_it:
        save("equality", {"instruction_sets": results})
    return int(any(r["differences"] for r in results.values()))


CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


def gpu_backend(args: argparse.Namespace, device: torch.device) -> int:
    """Random cases on the device, or in Triton's interpreter on a CPU; the exit status."""
    os.environ["TRITON_INTERPRET"] = "0" if device.type == "cuda" else "1"
    from benchmarks import differential  # Triton reads the variable when a kernel is defined

    torch.set_num_threads(1)
    result = differential.run(
        args.cases, device, args.seed, args.seconds, CLOCKS[args.clock], args.backend
    )
    where = "on the device" if device.type == "cuda" else "in the interpreter"
    print(
        f"{result['cases']:,} cases {where}, {result['shapes']:,} shapes,"
        f" {result['differences']} differences, {result['batch_checks']:,} batch checks,"
        f" {result['cases_per_minute']:,.0f} cases a minute"
    )
    for op, reason in result["left_out"].items():
        print(f"{op}: not compared ({reason})")
    print("\n".join(result["failures"]))
    if args.save:
        name = f"equality_{args.backend}" + ("_cuda" if device.type == "cuda" else "")
        print(save(name, {"seed": args.seed, "clock": args.clock, **result}, device))
    return int(result["differences"] > 0 or result["cases"] == 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; exit 1 on any difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cpu", choices=("cpu", "triton", "cuda"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--elements", type=int, default=50_000_000, help="row elements per instruction set"
    )
    parser.add_argument("--cases", type=int, default=5500, help="of triton")
    parser.add_argument("--seed", type=int, default=0, help="of triton's first case")
    parser.add_argument("--seconds", type=float, help="stop triton's cases after this time")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="of triton; cpu: processor seconds, for a machine that is not quiet",
    )
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/equality*.json"
    )
    args = parser.parse_args(argv)
    if args.backend == "cuda" and args.device != "cuda":
        parser.error("--backend cuda: its kernels read CUDA tensors only; add --device cuda")
    if args.backend != "cpu":
        device = require_device(args.device)
        raise SystemExit(gpu_backend(args, device))
    if args.device != "cpu":
        parser.error("--device cuda: --backend triton and --backend cuda run there")
    raise SystemExit(cpu_backend(args.elements, args.save))


if __name__ == "__main__":
    main()
