"""Baselines of other packages: those that are installed run, the others say so."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import eager, optional
from benchmarks.entry import Shape
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


@pytest.fixture
def liger(monkeypatch):
    """The package's fused loss in plain torch, and the targets it was given."""
    targets = []

    def fused(student, head, target):
        targets.append(target)
        return F.kl_div((student @ head.T).float().log_softmax(-1), target, reduction="batchmean")

    package = SimpleNamespace(liger_fused_linear_kl_div=fused)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", package)
    return targets


def test_liger_gets_fp32_probabilities_in_one_pass(liger, monkeypatch):
    """bf16 logits are never copied to fp32 first; the loss is that of the other baselines."""
    student, head, teacher, teacher_head = (X + i for i in range(4))
    student.requires_grad_()
    head.requires_grad_()
    tensors = (student, head, teacher, teacher_head)
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *a, **k: seen.append(x) or softmax(x, *a, **k))
    loss, *gradients = optional.liger_distillation(*tensors)()
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert {target.dtype for target in liger} == {torch.float32}
    assert torch.allclose(loss, eager.distillation_loss(*tensors), rtol=1e-5)
    assert [g.shape for g in gradients] == [student.shape, head.shape]


def test_products_of_a_head_are_not_autotuned(monkeypatch):
    """It would take longer than everything else, for a row that no figure reads."""
    modes = {}

    def compile_(function, mode, **options):
        modes[function.__name__] = mode
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    for entry in ENTRIES:
        if entry.op in ("distillation_loss", "distillation_loss_logits"):
            job = entry.build(Shape("x", {"n": 2, "K": 64, "V": 128}), torch.float32, X.device)
            job.optional["torch.compile of F.cross_entropy"]()
    assert modes == {"distillation_loss": None, "logits_loss": eager.MAX_AUTOTUNE}


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
