"""Compile what calls really launch: random calls at the sizes of real layers and at odd ones, with
every launch recorded in place of running, each recorded form compiled for both architectures.

    python -m tests.triton.launched_kernels [DRAWS]

prints ``{"forms": n, "failures": [...]}``. ``variants()`` names the forms that are worth a table;
this finds forms that it forgot. Run without TRITON_INTERPRET.
"""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import cubin
from benchmarks.kernel_report import CACHE, FLOAT_SUMS, PROCESSES, kernels_of, modules
from benchmarks.random_arguments import DRAWS, Draw
from llmqat_kernels.backends.triton import launch as launching
from llmqat_kernels.backends.triton.launch import TRITON_TYPES, Variant

OPTIONS = {"num_warps": 4, "num_stages": 3}


class RealSizes(Draw):
    """Sizes of SmolLM2's layers and two odd ones; token counts from decoding to training."""

    def rows(self):
        return self.random.choice((1, 3, 17, 64, 300, 2048))

    def columns(self, most=160):
        return self.random.choice((576, 1536, 64, 100))


def integer_type(value):
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def form(name, kernel, args, constants):
    """What Triton's JIT would compile for a launch: it specializes None, 1 and multiples of 16."""
    signature, fixed, divisible = {}, dict(constants), []
    options = {option: fixed.pop(option, default) for option, default in OPTIONS.items()}
    for parameter, value in zip(kernel.params, args, strict=False):
        argument, special = parameter.name, not parameter.do_not_specialize
        if value is None or (special and type(value) is int and value == 1):
            fixed[argument] = value
        elif isinstance(value, torch.Tensor):
            signature[argument] = f"*{TRITON_TYPES[value.dtype]}"
        elif type(value) is bool:
            signature[argument] = "u1"
        elif type(value) is int:
            signature[argument] = integer_type(value)
            if special and value % 16 == 0:
                divisible.append(argument)
        else:
            signature[argument] = "fp32"
    return Variant(name, kernel, signature, fixed, divisible=tuple(divisible), **options)


def key(variant):
    parts = (variant.signature, variant.constants, variant.divisible)
    return f"{variant.kernel.__name__} {parts} {variant.num_warps} {variant.num_stages}"


def record(arch, draws):
    """Form -> variant of every launch of ``draws`` calls of each operator."""
    found = {}
    owner = ""

    def recording(kernel, grid, *args, **constants):
        if 0 not in grid:
            variant = form(owner, kernel, args, constants)
            found[key(variant)] = variant

    loaded = [m for n, m in sys.modules.items() if n.startswith(launching.__package__)]
    for module in loaded:
        if hasattr(module, "launch") and callable(module.launch):
            module.launch = recording
        if hasattr(module, "architecture"):
            module.architecture = lambda device: arch
    for owner in modules():
        for op, function in kernels_of(owner).KERNELS.items():
            for seed in range(draws if op in DRAWS else 0):
                arguments = list(DRAWS[op](RealSizes(seed, wide=True)))
                if op == "repacked_matmul":  # its weight has the layout of this backend
                    repack = kernels_of(owner).KERNELS["repack_weight"]
                    arguments[2] = repack(arguments[2], arguments[6])
                function(*arguments)
    return found


def examine(job):
    variant, arch = FOUND[job], job[0]
    promises = {cubin.APPROXIMATE} if variant.name in FLOAT_SUMS else set()
    try:
        compiled = cubin.compile_variant(variant, arch)
    except Exception as error:
        return [f"sm_{arch} {job[1]}: {type(error).__name__}: {error}"]
    figures = cubin.cached_measure(compiled, arch, CACHE / "figures")
    return [f"sm_{arch} {job[1]}: {s}" for s in cubin.failures(figures, arch, promises)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in modules():
        kernels_of(name)
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    FOUND = {
        (arch, name): variant
        for arch in cubin.ARCHS
        for name, variant in record(arch, draws).items()
    }
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        failed = [line for lines in pool.map(examine, FOUND) for line in lines]
    print(json.dumps({"forms": len(FOUND), "failures": failed}, indent=1))
