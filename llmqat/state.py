"""What was done to a model, kept on the model and written with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat_kernels import SPEC_VERSION

PREPARED = "prepared"
PACKED = "packed"
STATE_ATTRIBUTE = "llmqat_state"


@dataclass(frozen=True)
class State:
    """What was done to a model: its stage (`prepared` or `packed`), settings, and whether its
    blocks are fused.
    """

    stage: str
    config: QATConfig
    fused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The `llmqat` entry of config.json."""
        # Only where it says something: versions without fused blocks read all others.
        fused = {"fused": True} if self.fused else {}
        return {"spec": SPEC_VERSION, "stage": self.stage, **fused, **self.config.to_record()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> State:
        """The inverse of :meth:`to_dict`; ConfigError on an unknown key, stage or specification
        version.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"llmqat: expected an object, got {type(values).__name__}")
        fields = dict(values)
        spec, stage = fields.pop("spec", None), fields.pop("stage", None)
        fused = fields.pop("fused", False)
        if spec != SPEC_VERSION:
            raise ConfigError(
                f"llmqat.spec: {str(spec)[:40]!r} is unknown; this version reads {SPEC_VERSION!r}"
            )
        if stage not in (PREPARED, PACKED):
            raise ConfigError(
                f"llmqat.stage: {str(stage)[:40]!r} is unknown; expected {PREPARED!r} or {PACKED!r}"
            )
        if not isinstance(fused, bool):
            raise ConfigError(
                f"llmqat.fused: {str(fused)[:40]!r} is unknown; expected true or false"
            )
        return cls(stage, QATConfig.from_dict(fields), fused)


def state_of(model: nn.Module) -> State | None:
    """The state of a prepared or converted model; None for any other."""
    state = getattr(model, STATE_ATTRIBUTE, None)
    return state if isinstance(state, State) else None
