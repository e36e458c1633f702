"""The content key of a form: what changes it and what does not."""

import importlib.util
import sys
from dataclasses import replace

import pytest

from benchmarks import kernel_keys
from llmqat_kernels.backends.triton import quantize
from llmqat_kernels.backends.triton.launch import Variant

HELPER = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)

@triton.jit
def scaled(x):
    return x * FACTOR
"""
KERNEL = """
import triton
import triton.language as tl
import {helper} as helper

OTHER = tl.constexpr((1.0, 2.0))

@triton.jit(do_not_specialize=["n"])
def kernel(x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = helper.scaled(tl.load(x + at, mask=at < n)) + OTHER[0]
    tl.store(x + at, value * helper.FACTOR)
"""


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key of `KERNEL`, of two files with some of their text replaced."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 0

    def load(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    def key(*replaced):
        nonlocal count
        count += 1
        helper, kernel = HELPER, KERNEL
        for old, new in replaced:
            assert old in helper + kernel
            helper, kernel = helper.replace(old, new), kernel.replace(old, new)
        load(f"helper{count}", helper)
        # The files have other names each time; the alias in the kernel's text is the same.
        return kernel_keys.function_key(
            load(f"kernel{count}", kernel.replace("{helper}", f"helper{count}")).kernel
        )

    return key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FACTOR = tl.constexpr(3)", "FACTOR = tl.constexpr(4)"),
        ("return x * FACTOR", "return x + FACTOR"),
        ("(1.0, 2.0)", "(1.5, 2.0)"),
        ("at < n", "at <= n"),
        ("SIZE: tl.constexpr", "SIZE"),
    ],
)
def test_code_and_constants_change_the_key(key, old, new):
    assert key((old, new)) != key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@triton.jit\n", "\n\n# a comment\n@triton.jit\n"),
        ("def scaled(x):\n", 'def scaled(x):\n    """What it does."""\n'),
        ("x * FACTOR", "(x * FACTOR)  # why"),
        ("x, n, SIZE: tl.constexpr)", "\n    x, n,\n    SIZE: tl.constexpr,\n)"),
        ("OTHER = tl", "UNUSED = 1\nOTHER = tl"),
    ],
)
def test_comments_layout_and_lines_do_not(key, old, new):
    assert key((old, new)) == key()


def test_what_is_no_constant_is_refused(key):
    with pytest.raises(ValueError, match=r"OTHER: a kernel uses a set; make it a tl\.constexpr"):
        key(("tl.constexpr((1.0, 2.0))", "{1.0}"), ("OTHER[0]", "OTHER"))
    with pytest.raises(ValueError, match="'MISSING' is neither local nor global"):
        key(("OTHER[0]", "MISSING"))


def test_everything_of_a_form_changes_its_key(monkeypatch):
    monkeypatch.setattr(kernel_keys, "tools", lambda arch: "triton 1")
    monkeypatch.setattr(kernel_keys.cubin, "multiples_of_16", lambda variant: variant.aligned)
    form = Variant("a name", quantize.quantize_kernel, {"x": "*bf16"}, {"QMAX": 7})
    others = [
        replace(form, kernel=quantize.fake_quantize_kernel),
        replace(form, signature={"x": "*fp16"}),
        replace(form, constants={"QMAX": 127}),
        replace(form, aligned=False),
        replace(form, num_warps=8),
        replace(form, num_stages=2),
    ]
    keys = [kernel_keys.form_key(f, 80) for f in (form, *others)] + [kernel_keys.form_key(form, 90)]
    assert len({*keys}) == len(keys)
    assert kernel_keys.form_key(replace(form, name="another", promises={"x"}), 80) == keys[0]
    monkeypatch.setattr(kernel_keys, "tools", lambda arch: "triton 2")
    assert kernel_keys.form_key(form, 80) != keys[0]
