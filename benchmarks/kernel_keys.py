"""The content key of a form of a Triton kernel: a hash of everything that decides its figures.

That is the kernel and every device function and constant it uses, the types, constants and launch
options of the form, the architecture, the releases of triton and ptxas, triton's environment
variables, and how machine code is measured (benchmarks/cubin.py). Comments, docstrings, layout,
line numbers and paths are not in it, and nothing is compiled: under a millisecond a form.

Triton's own cache key will not do: it has the line at which a function begins, and it has no
constant that a kernel takes from another module (``numerics.ZERO_AMAX``).
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import cubin
from llmqat_kernels.backends.triton.launch import OPTIONS, Variant

LENGTH = 16
"""Hexadecimal digits of a key."""
UNSEEN = frozenset({"ctx", "kind", "type_comment", "decorator_list"})
"""Fields of the syntax tree that do not decide what is compiled (specialization is in the form)."""


def digest(text: str) -> str:
    """The first digits of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def canonical(node: Any) -> str:
    """A syntax tree as text that is the same in every release of Python and any layout."""
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={canonical(value)}"
        for name, value in ast.iter_fields(node)
        if name not in UNSEEN and value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def without_docstrings(tree: ast.AST) -> ast.AST:
    """``tree`` with the docstring of every function, class and module removed, in place."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                statement
                for statement in body
                if not (
                    isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)
                )
            ]
    return tree


def _local_names(tree: ast.FunctionDef) -> set[str]:
    arguments = tree.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    return {argument.arg for argument in every} | stored


def _references(tree: ast.FunctionDef) -> Iterator[list[str]]:
    """``numerics.exp`` as ["numerics", "exp"], of everything that is not a local name."""
    local, inner = _local_names(tree), set()
    for node in ast.walk(tree):  # outer nodes come first
        if id(node) in inner or not isinstance(node, ast.Name | ast.Attribute):
            continue
        path, value = [], node
        while isinstance(value, ast.Attribute):
            path.append(value.attr)
            value = value.value
            inner.add(id(value))
        if isinstance(value, ast.Name) and value.id not in local:
            yield [value.id, *reversed(path)]


def _resolve(path: list[str], names: dict[str, Any], where: str) -> tuple[str, Any]:
    """The longest part of ``path`` that leads through modules, and its object."""
    if path[0] not in names:
        raise ValueError(f"{where}: {path[0]!r} is neither local nor global")
    value, taken = names[path[0]], path[:1]
    for name in path[1:]:
        if not isinstance(value, ModuleType):
            break
        value = getattr(value, name)
        taken.append(name)
    return ".".join(taken), value


def _of_triton(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "triton"


def _described(value: Any, where: str) -> str | None:
    """What a global contributes; None: its name says all, for the release of triton is in the key.

    Raises:
        ValueError: an object of a kind that is not known to be constant.
    """
    if isinstance(value, ModuleType) or any(value is v for v in vars(builtins).values()):
        return None
    if hasattr(value, "arg_names"):  # compiled by triton.jit
        return None if _of_triton(value.fn) else function_key(value)
    if type(value).__name__ == "constexpr":
        return _described(value.value, where)
    if value is None or isinstance(value, bool | int | float | str | tuple | list):
        return repr(value)
    if _of_triton(value) or _of_triton(type(value)):
        return None
    raise ValueError(f"{where}: a kernel uses a {type(value).__name__}; make it a tl.constexpr")


_function_keys: dict[int, tuple[Any, str]] = {}


def function_key(function: Any) -> str:
    """The key of a ``@triton.jit`` function: its code, and the keys of what it uses.

    Raises:
        ValueError: it uses a name that does not exist or an object that is no constant.
    """
    if id(function) in _function_keys:
        return _function_keys[id(function)][1]
    python = function.fn
    where = f"{python.__module__}.{python.__qualname__}"
    source = textwrap.dedent("".join(inspect.getsourcelines(python)[0]))
    tree = without_docstrings(ast.parse(source)).body[0]  # type: ignore[attr-defined]
    names = {**vars(builtins), **python.__globals__, **inspect.getclosurevars(python).nonlocals}
    used = dict(_resolve(path, names, where) for path in _references(tree))
    parts = {name: _described(value, f"{where}: {name}") for name, value in sorted(used.items())}
    options = (getattr(function, "noinline", None), getattr(function, "debug", None))
    key = digest(json.dumps([canonical(tree), parts, repr(options)]))
    _function_keys[id(function)] = (function, key)  # keeps it alive: ids are used again
    return key


@cache
def tools(arch: int) -> str:
    """Releases of triton and ptxas, triton's environment, and the code that measures."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas

    said = subprocess.run(
        [get_ptxas(arch).path, "--version"], capture_output=True, text=True, check=True
    )
    ptxas = re.search(r"V[\d.]+", said.stdout)
    if ptxas is None:
        raise ValueError(f"ptxas --version names no release: {said.stdout!r}")
    measuring = canonical(without_docstrings(ast.parse(Path(cubin.__file__).read_text())))
    environment = sorted(get_cache_invalidating_env_vars().items())
    return json.dumps([triton.__version__, ptxas[0], environment, digest(measuring)])


def form_key(variant: Variant, arch: int) -> str:
    """The content key of one form on one architecture."""
    form = [
        function_key(variant.kernel),
        sorted(variant.signature.items()),
        sorted((name, repr(value)) for name, value in variant.constants.items()),
        cubin.multiples_of_16(variant),
        [variant.num_warps, variant.num_stages, sorted(OPTIONS.items())],
        [arch, tools(arch)],
    ]
    return digest(json.dumps(form))
