"""An account of every module of a model: what is quantized, what is not, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.models.families import find_family, iter_blocks, iter_linears
from llmqat.nn.attention import ATTENTION_NAME, MODULE_ATTRIBUTE
from llmqat.nn.fused import FUSED_PARTS, FusedDecoderLayer
from llmqat.nn.linear import QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.state import PACKED, state_of

KEPT = "kept"
QUANTIZED = "quantized"
FUSED = "fused"


@dataclass(frozen=True)
class Entry:
    """One module: full name, class, `quantized`, `fused` or `kept`, and how or why."""

    name: str
    kind: str
    status: str
    detail: str


@dataclass(frozen=True)
class ConversionReport:
    """One entry per module without children, one per attention module and one per fused block."""

    stage: str
    setting: str
    entries: tuple[Entry, ...]

    def count(self, status: str) -> int:
        """Number of entries with a status."""
        return sum(entry.status == status for entry in self.entries)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """One line per kind of module, counted over the blocks."""
        groups: dict[tuple[str, str, str, str], int] = {}
        for entry in self.entries:
            short = ".".join("*" if part.isdigit() else part for part in entry.name.split("."))
            key = (short, entry.kind, entry.status, entry.detail)
            groups[key] = groups.get(key, 0) + 1
        widths = [max(len(key[i]) for key in groups) for i in range(3)]
        fused = f", {self.count(FUSED)} blocks fused" if self.count(FUSED) else ""
        lines = [
            f"{self.stage} {self.setting}: {self.count(QUANTIZED)} quantized, {self.count(KEPT)}"
            f" kept{fused}"
        ]
        for (short, kind, status, detail), count in groups.items():
            cells = "  ".join(
                text.ljust(width) for text, width in zip((short, kind, status), widths, strict=True)
            )
            lines.append(f"{count:4d} x  {cells}  {detail}")
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """Account for every module of a prepared or converted model.

    Raises:
        ConfigError: the model is neither, or something that its settings ask for is missing.
    """
    state = state_of(model)
    if state is None:
        raise ConfigError(
            "model: neither prepared nor converted; call prepare(model, config) first"
        )
    config, family = state.config, find_family(model)
    linears = {name: short for name, short, _ in iter_linears(model, family)}
    blocks = {name for name, _ in iter_blocks(model, family)}
    attentions = {f"{name}.{family.attention}" for name in blocks}
    split = bool(family.kv_linears)
    if not state.fused:
        _check_attention_function(model, config, split)
    entries = []
    for name, module in model.named_modules():
        if name in linears:
            entries.append(
                _linear_entry(name, module, config, linears[name] in family.kv_linears, state.stage)
            )
        elif name in attentions:
            entries.append(_attention_entry(name, module, config, state.fused, split))
        elif name in blocks and state.fused:
            entries.append(_block_entry(name, module))
        elif not any(True for _ in module.children()):
            entries.append(Entry(name, type(module).__name__, KEPT, _reason(name, module, model)))
    return ConversionReport(state.stage, config.setting, tuple(entries))


def _linear_entry(
    name: str, module: nn.Module, config: QATConfig, is_kv: bool, stage: str
) -> Entry:
    kind = type(module).__name__
    asked = config.quantizes_linears or (is_kv and config.kv.enabled and config.kv_mode == "paper")
    expected = QuantizedLinear if stage == PACKED else QATLinear
    if isinstance(module, expected):
        return Entry(name, kind, QUANTIZED, module.spec.describe())
    if asked:
        raise ConfigError(f"{name}: {config.setting} asks for a {expected.__name__}, found {kind}")
    return Entry(name, kind, KEPT, f"{config.setting} leaves it in full precision")


def _block_entry(name: str, module: nn.Module) -> Entry:
    kind = type(module).__name__
    parts = {
        name: (module, FusedDecoderLayer),
        **{f"{name}.{child}": (getattr(module, child), cls) for child, cls in FUSED_PARTS.items()},
    }
    for part, (found, expected) in parts.items():
        if not isinstance(found, expected):
            raise ConfigError(
                f"{part}: the model is fused, but this is a {type(found).__name__}; prepare a fresh"
                " model"
            )
    return Entry(name, kind, FUSED, "norms, RoPE and SwiGLU write the codes that the linears read")


def _attention_entry(
    name: str, module: nn.Module, config: QATConfig, fused: bool, split: bool
) -> Entry:
    kind = type(module).__name__
    if not config.kv.enabled:
        return Entry(name, kind, KEPT, f"K and V: kv_bits {config.kv_bits} is off")
    if config.kv_mode == "paper" and split:
        return Entry(
            name,
            kind,
            QUANTIZED,
            f"KV{config.kv_bits} before RoPE, per token"
            + ("" if fused else " (outputs of k_proj, v_proj)"),
        )
    if not fused and getattr(module, MODULE_ATTRIBUTE, None) is None:
        raise ConfigError(
            f"{name}: {config.setting} asks for quantized K and V, but it has no quantizer"
        )
    when = "after RoPE, " if split else ""
    each = "per token" if config.kv_mode == "paper" else "per token and head"
    return Entry(name, kind, QUANTIZED, f"KV{config.kv_bits} {when}{each}")


def _check_attention_function(model: nn.Module, config: QATConfig, split: bool) -> None:
    if not config.kv.enabled or (config.kv_mode == "paper" and split):
        return
    name = compat.attention_name(model)
    if name != ATTENTION_NAME:
        raise ConfigError(
            f"model: attention is {name!r}, which ignores kv_bits {config.kv_bits}; set"
            f" {ATTENTION_NAME!r}"
        )


def _reason(name: str, module: nn.Module, model: nn.Module) -> str:
    if not any(True for _ in module.parameters()):
        return "has no weights"
    if isinstance(module, nn.Embedding):
        return "embeddings stay in full precision"
    if module is model.get_output_embeddings():
        return "the head stays in full precision"
    if "norm" in type(module).__name__.lower():
        return "norms stay in full precision"
    return "not one of the linears that the method quantizes"
