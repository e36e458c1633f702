"""The one binary on processors this machine is not: emulated, without AVX-512 or without AVX2.

A wrong dispatch would die of an illegal instruction there. Needs `qemu-user`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmqat_kernels import native

pytestmark = pytest.mark.slow
QEMU = shutil.which("qemu-x86_64")
CHECK = """
import sys
sys.path[:0] = {path}
import torch
import llmqat_kernels as qk
from llmqat_kernels import native
from llmqat_kernels.spec import linear, quantize
from llmqat_kernels.testing import assert_same_bits, special_rows

torch.set_num_threads(1)
assert native.isa() == {isa!r}, native.isa()
for dtype in (torch.float32, torch.bfloat16):
    x = special_rows(129, dtype)
    for bits in (4, 8):
        for got, want in zip(qk.quantize(x, bits), quantize.quantize(x, bits), strict=True):
            assert_same_bits(got, want)
w, scale = qk.quantize(torch.randn(70, 96), 4)
x = torch.randn(17, 96)
y = qk.quantized_linear(x, qk.pack_int4(w), scale, w_bits=4, a_bits=8)
assert_same_bits(y, linear.quantized_linear(x, w, scale, None, 4, 8))
qk.float_matmul(x, qk.repack_weight(torch.randn(70, 96), 32), n=70)
floats = qk.repack_weight(linear.dequantize(w, scale, -1, torch.float32), 32)
for rows in (1, 3, 17):
    y = qk.repacked_linear(x[:rows], qk.repack_weight(w, 4), scale, n=70, w_bits=4)
    assert_same_bits(y, qk.float_matmul(x[:rows], floats, n=70))
rows = torch.arange(3)
qk.sample(torch.randn(3, 500), rows, rows, seed=1)
"""


@pytest.mark.parametrize(("processor", "isa"), [("Haswell", "avx2"), ("Nehalem", "scalar")])
def test_older_processors(processor, isa):
    if QEMU is None:
        pytest.skip("qemu-x86_64 is not installed (package qemu-user)")
    if not native.is_available():
        pytest.skip(f"cpu backend: {native.why_not()}")
    check = CHECK.format(path=[p for p in sys.path if p], isa=isa)
    python = str(Path(sys.executable).resolve())
    done = subprocess.run(
        [QEMU, "-cpu", processor, python, "-c", check], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
