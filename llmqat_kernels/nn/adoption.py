"""How an existing module becomes one of these: in place, so optimizers, hooks and names hold."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def become(module: nn.Module, cls: type[Module], **attributes: Any) -> Module:
    """Turn `module` itself into a `cls`: same object, parameters, children, hooks and names.

    Args:
        cls: a class that adds no parameters and no children. attributes: what it needs besides.
    """
    module.__class__ = cls
    assert isinstance(module, cls)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
