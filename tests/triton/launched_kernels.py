"""What calls really launch: random calls of every operator, with every launch recorded in place of
running, each form as Triton's own JIT would specialize it. Is each proven by one of ``variants()``?

    python -m tests.triton.launched_kernels [DRAWS]

prints ``{"forms": n, "operators": [...], "uncovered": [...]}``. Nothing is compiled. Run without
TRITON_INTERPRET.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from benchmarks import cubin
from benchmarks.kernel_forms import kernels_of, modules, variants
from benchmarks.kernel_kinds import uncovered
from benchmarks.random_arguments import DRAWS, Draw
from llmqat_kernels.backends.triton import launch as launching
from llmqat_kernels.backends.triton.launch import OPTIONS, Variant
from llmqat_kernels.kv import KVCache

NO_KERNEL = {"repack_weight", "repacked_linear"}
"""Operators that launch nothing, or only what other operators launch."""


class AnySize(Draw):
    """Sizes of real layers and odd ones; token counts from decoding to training."""

    def rows(self):
        return self.random.choice((1, 3, 17, 64, 300, 2048))

    def columns(self, most=160):
        if most < 160:
            return self.random.choice((1, 16, 33, 48, 192, 576))
        return self.random.choice(
            (1, 7, 16, 64, 100, 250, 576, 1024, 1536, 3000, 4096, 9000, 28672)
        )

    def x(self, rows, columns, dtype):
        return self.layout(torch.empty(rows, columns, dtype=dtype))

    def groups(self):
        if self.random.random() < 0.5:
            return self.columns(), -1
        size = self.random.choice((1, 7, 8, 16, 32, 48, 64, 96, 100, 128, 192, 256, 384))
        return size * self.random.randint(1, 4), size

    def heads(self):
        heads = self.random.choice((1, 2, 3, 8, 32))
        dims = (2, 6, 8, 14, 16, 30, 40, 64, 66, 72, 80, 96, 128, 160, 200, 256)
        return self.random.choice((1, 5)), heads, self.random.choice(dims)

    def codes(self, rows, columns, bits=8):
        return self.layout(torch.zeros(rows, columns, dtype=torch.int8))

    def tensor(self, shape, dtype):
        """One time in four it begins at no multiple of 16 bytes."""
        flat = torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)
        return (flat[1:] if self.random.random() < 0.25 else flat[:-1]).view(shape)


def attention_decode(d):
    (n, kv_heads, dim), dtype = d.heads(), d.dtype()
    bits, mode = d.random.choice((4, 8, 16)), d.random.choice(("paper", "serving"))
    cache = KVCache.allocate(2, kv_heads, 300, dim, bits=bits, mode=mode, dtype=dtype)
    tensors = [
        d.tensor(t.shape, t.dtype)
        for t in (cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale)
    ]
    q = d.x(n, 2 * kv_heads * dim, dtype).reshape(n, 2 * kv_heads, dim)
    index = [d.tensor((n,), torch.int64) for _ in range(2)]
    return q, *tensors, *d.tables(300, dim), *index, 0.1, bits, cache.pre_rope


def rms_norm_backward(d):
    x, weight, eps = DRAWS["rms_norm"](d)
    return d.x(*x.shape, x.dtype), x, weight, eps, d.maybe(d.x(*x.shape, x.dtype))


def silu_mul_backward(d):
    gate, up = DRAWS["silu_mul"](d)
    return d.x(*gate.shape, gate.dtype), gate, up


def backward_input(d):
    (columns, group), rows, n = d.groups(), d.rows(), d.columns(48)
    scale = d.scale(n) if group == -1 else d.scale(n, columns // group)
    return d.x(rows, n, d.dtype()), d.codes(n, columns), scale, group


def backward_weight(d):
    rows, n, columns = d.rows(), d.columns(48), d.columns(48)
    return d.x(rows, n, d.dtype()), d.codes(rows, columns), d.scale(rows), d.dtype()


def _loss_sizes(d):
    return d.random.choice((1, 5, 40)), d.random.choice((50, 576, 2048, 2049, 4000))


def distillation_loss(d):
    (n, v), student, teacher = _loss_sizes(d), d.dtype(), d.dtype()
    valid, chunk = d.maybe(d.tensor((n,), torch.bool)), d.random.choice((3, 16))
    heads = [(d.tensor((n, 16), dt), d.tensor((v, 16), dt)) for dt in (student, teacher)]
    return *heads[0], *heads[1], valid, chunk


def distillation_loss_logits(d):
    n, v = _loss_sizes(d)
    valid = d.maybe(d.tensor((n,), torch.bool))
    return d.x(n, v, d.dtype()), d.x(n, v, d.dtype()), valid


def distillation_loss_top_k(d):
    student, head, _, _, valid, chunk = distillation_loss(d)
    entries = (student.shape[0], d.random.choice((1, 100, 1000, 1100)))
    stored = torch.zeros(entries), torch.zeros(entries, dtype=torch.int64)
    return student, head, *stored, valid, chunk


ALL_DRAWS = DRAWS | {
    "attention_decode": attention_decode,
    "rms_norm_backward": rms_norm_backward,
    "silu_mul_backward": silu_mul_backward,
    "qat_matmul_backward_input": backward_input,
    "qat_matmul_backward_weight": backward_weight,
    "distillation_loss": distillation_loss,
    "distillation_loss_logits": distillation_loss_logits,
    "distillation_loss_top_k": distillation_loss_top_k,
}


def form(kernel, args, constants, regular, arch):
    """The form of a launch, as Triton's JIT specializes it.

    Raises:
        AssertionError: the JIT specializes other arguments than `launching.Variant` says.
    """
    whole = regular and launching.multiples(kernel, args)
    chosen = kernel if whole else launching.unspecialized(kernel)
    backend = CUDABackend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(chosen.signature, chosen.params, backend)
    values, specialized, options = bind(*args, **constants, **OPTIONS)
    types = dict(zip(values, specialized, strict=True))
    signature = {name: kind for name, (kind, _) in types.items() if kind != "constexpr"}
    fixed = {name: values[name] for name, (kind, _) in types.items() if kind == "constexpr"}
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    variant = Variant("launched", kernel, signature, fixed, aligned=whole, **launch)
    multiples = sorted(name for name, (kind, said) in types.items() if said == "D")
    promised = cubin.multiples_of_16(variant)
    assert multiples == promised, f"{kernel.__name__}: {multiples}, not {promised}"
    return variant


def record(arch, draws):
    """Variants of every launch of ``draws`` calls of each operator, by what they are; operators."""
    found, operators = {}, set()

    def recording(kernel, grid, *args, regular=True, **constants):
        if 0 not in grid:
            variant = form(kernel, args, constants, regular, arch)
            parts = (variant.signature, variant.constants, variant.aligned)
            found[f"{kernel.__name__} {parts} {variant.num_warps} {variant.num_stages}"] = variant

    loaded = [m for n, m in sys.modules.items() if n.startswith(launching.__package__)]
    for module in loaded:
        if callable(getattr(module, "launch", None)):
            module.launch = recording
        if hasattr(module, "architecture"):
            module.architecture = lambda device: arch
    for owner in modules():
        for op, function in kernels_of(owner).KERNELS.items():
            if op in NO_KERNEL:
                continue
            operators.add(op)
            for seed in range(draws):
                arguments = list(ALL_DRAWS[op](AnySize(seed, wide=True)))
                if op == "repacked_matmul":  # its weight has the layout of this backend
                    repack = kernels_of(owner).KERNELS["repack_weight"]
                    arguments[2] = repack(arguments[2], arguments[6])
                function(*arguments)
    return found, operators


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in modules():
        kernels_of(name)
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    forms, wrong, called = 0, [], set()
    for arch in cubin.ARCHS:
        launched, operators = record(arch, draws)
        listed = [variant for module in modules() for variant in variants(module, arch).values()]
        missed = uncovered(launched.values(), listed)
        wrong += [f"sm_{arch} {name}" for name, variant in launched.items() if variant in missed]
        forms, called = forms + len(launched), called | operators
    print(json.dumps({"forms": forms, "operators": sorted(called), "uncovered": wrong}, indent=1))
