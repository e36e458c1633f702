"""What the tests of the CUDA linears share: their C struct, the weight layout, guarded calls."""

import ctypes

import torch

from llmqat_kernels.testing import generator
from tests.emulator.memory import guard, poisoned

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_K, ROWS = 128, 16


class Problem(ctypes.Structure):
    """LlmqatLinear of csrc/cuda/quantized_linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "a_scale", "w", "w_scale", "bias")),
        *((name, ctypes.c_void_p) for name in ("residual", "y", "workspace")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "sms")),
        *((name, ctypes.c_int) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_bool) for name in ("nibbles", "silu_mul")),
    ]


def layout(w, nibbles):
    """The layout of codes w [n, k], from its description (spec 25) alone."""
    n, k = w.shape
    half = (n + 1) // 2
    tiles, blocks = -(-half // ROWS), max(1, -(-k // BLOCK_K))
    parts = torch.zeros(2, tiles * ROWS, blocks * BLOCK_K, dtype=torch.int8)
    parts[0, :half, :k], parts[1, : n - half, :k] = w[:half], w[half:]
    if nibbles:
        parts = (((parts[0] & 15) << 4) | (parts[1] + 8))[None]
    # part; tile, group, row; block, half of 64, quarter, fragment, word, byte
    parts = parts.view(-1, tiles, 8, 2, blocks, 2, 4, 2, 2, 4)
    codes = parts.permute(1, 4, 5, 7, 0, 2, 6, 8, 3, 9).reshape(-1).view(torch.uint8)
    return torch.cat([codes, torch.tensor(list(b"llmqat fragments"), dtype=torch.uint8)])


def run(kernels, a, a_scale, packed, w_scale, dtype, *, nibbles, sms=3, **options):
    """One linear on guarded memory; ``options``: bias, residual, silu_mul. An ``a`` at an unaligned
    address stays there."""
    (m, k), n, bias = a.shape, w_scale.numel(), options.get("bias")
    columns = n // 2 if options.get("silu_mul") else n
    tensors = {"a_scale": a_scale, "w": packed, "w_scale": w_scale, "bias": bias}
    tensors |= {"residual": options.get("residual"), "a": a}
    if a.data_ptr() % 16 != 0:
        del tensors["a"]
    held = {name: guard(tensor) for name, tensor in tensors.items() if tensor is not None}
    held["workspace"] = guard(torch.zeros((8192 + 2 * sms * 32768) // 4, dtype=torch.int32))
    held["y"] = poisoned((m, columns), dtype)
    problem = Problem(
        **{"a": a.data_ptr()} | {name: memory.pointer for name, memory in held.items()},
        m=m,
        n=n,
        k=k,
        sms=sms,
        dtype=DTYPES[dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        nibbles=nibbles,
        silu_mul=bool(options.get("silu_mul")),
    )
    launcher = "integer" if a.dtype == torch.int8 else "float"
    assert getattr(kernels, f"llmqat_cuda_{launcher}_linear")(ctypes.byref(problem), None) == 0
    for memory in held.values():
        memory.check()
    assert not held["workspace"].tensor.any(), "the workspace must be left as zeros"
    return held["y"].tensor


def case(m, n, k, bits, seed=0):
    """Random codes and scales: a, a_scale, w, w_scale."""
    g, top = generator(seed + m + 100 * n + k), 7 if bits == 4 else 127
    a = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-top, top + 1, (n, k), generator=g, dtype=torch.int8)
    scales = [torch.rand(size, generator=g) * 0.02 for size in (m, n)]
    return a, scales[0], w, scales[1]
