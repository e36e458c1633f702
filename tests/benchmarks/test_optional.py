"""Baselines of other packages: those that are installed run, the others say so."""

import importlib.util

import pytest
import torch

from benchmarks import eager, optional
from benchmarks.registry import ENTRIES
from llmqat_kernels.spec import activation, norm, quantize

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_versions_of_every_package():
    assert set(optional.versions()) == set(optional.PACKAGES)
    assert all(optional.versions().values())


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("torchao", lambda: optional.torchao_fake_quantize(X, 4)),
        ("torchao", lambda: optional.torchao_int8(X, X)),
        ("gemlite", lambda: optional.gemlite_int8(X, X, X)),
        ("gemlite", lambda: optional.gemlite_int4(X, X, X)),
        ("humming", lambda: optional.humming(X, X, 8)),
        ("humming", lambda: optional.humming_layer(X, 4, "bfloat16")),
        ("gemlite", lambda: optional.gemlite_layer(X, X[:, 0], 4, X.dtype)),
        ("liger_kernel", lambda: optional.liger_distillation(X, X, X, X)),
    ],
)
def test_a_missing_package_raises_module_not_found(package, call):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ModuleNotFoundError):
        call()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (quantize.quantize, (X, 8)),
        (quantize.fake_quantize, (X, 4)),
        (norm.rms_norm_quantize, (X, X[0], 1e-5, 8, X)),
        (activation.silu_mul_quantize, (X, X, 8)),
        (eager.silu_mul_quantize, (X, X, 8)),
        (eager.distillation_loss, (X, X, X, X)),
        (eager.logits_loss, (X, X)),
    ],
)
def test_what_is_compiled_is_one_graph(function, args):
    """torch.compile on a GPU must not fall back to eager parts; the tracing is the same here."""
    expected = function(*args)
    actual = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")(*args)
    for ours, theirs in zip(_tuple(actual), _tuple(expected), strict=True):
        assert torch.equal(ours, theirs)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_the_entries_name_their_optional_baselines():
    """Making a job imports nothing: the makers do, when the runner asks."""
    names = set()
    for entry in ENTRIES:
        if entry.op in ("fake_quantize", "quantized_linear", "distillation_loss"):
            grid = entry.any_grid
            sizes = {"rows": 2, "C": 64, "M": 2, "N": 64, "K": 64, "n": 2, "V": 128}
            shape = type(grid.shapes[0])("small", {k: sizes[k] for k in grid.shapes[0].sizes})
            names |= set(entry.build(shape, torch.bfloat16, torch.device("cpu")).optional)
    assert {"torchao", "gemlite", "humming", "torch.compile of the spec"} <= names
    assert "Liger with the teacher's head" in names
