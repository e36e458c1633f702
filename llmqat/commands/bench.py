"""`llmqat bench kv`: KV memory and decode speed by sequence length for 16, 8 and 4 bits."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.bench import kv, kv_report
from llmqat.commands.actions import Action
from llmqat.config import KV_MODES
from llmqat.convert import state_of
from llmqat.errors import ConfigError
from llmqat.eval.cost import ModelShape
from llmqat.models.shapes import SHAPES
from llmqat.runtime.loading import load_model, parse_device, parse_dtype, set_threads
from llmqat.train.arguments import check_choice, check_number
from llmqat.train.run import announce_backend


@dataclass
class KVArguments:
    """What is measured, and where the result goes."""

    model: str = field(
        metadata={
            "help": "Folder of a model; or a name such as llama-7b, of which sizes are known but no"
            " weights are at hand: computed only."
        }
    )
    seq_lens: str = field(
        default="1k,2k,4k,8k,16k,32k", metadata={"help": "Tokens per sequence; k is 1024."}
    )
    bits: str = field(default="16,8,4", metadata={"help": "Widths of the cache."})
    kv_mode: str | None = field(
        default=None, metadata={"help": "paper or serving; default: the model's, else paper."}
    )
    batch: int = field(default=1, metadata={"help": "Sequences at one time."})
    steps: int = field(default=8, metadata={"help": "Timed tokens per length and width."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float16, of 16 bits."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; torch's default otherwise."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Folder for kv.json, kv.md and kv.png."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of the table."})

    def __post_init__(self) -> None:
        check_number("batch", self.batch, 1)
        check_number("steps", self.steps, 2)
        check_choice("dtype", self.dtype, ("bfloat16", "float16"))
        if self.kv_mode is not None:
            check_choice("kv-mode", self.kv_mode, KV_MODES)
        self.lengths()
        self.widths()

    def lengths(self) -> list[int]:
        """`seq_lens` as numbers."""
        return kv.parse_lengths(self.seq_lens)

    def widths(self) -> list[int]:
        """`bits` as numbers."""
        known = {str(bits): bits for bits in kv.WIDTHS}
        parts = [part.strip() for part in self.bits.split(",")]
        for part in parts:
            check_choice("bits", part, tuple(known))
        return [known[part] for part in dict.fromkeys(parts)]


def bench_kv(arguments: KVArguments) -> dict[str, Any]:
    """Everything that is computed and measured, as JSON values.

    Raises:
        ConfigError: no such model or shape, or a family that is not supported.
        CheckpointError: an unreadable folder.
    """
    a = arguments
    common: dict[str, Any] = {"model": a.model, "batch": a.batch}
    if a.model in SHAPES and not Path(a.model).is_dir():
        return common | _computed(a)
    if not Path(a.model).is_dir():
        raise ConfigError(
            f"--model: {a.model} is neither a folder nor a known shape; shapes: {', '.join(SHAPES)}"
        )
    device = parse_device(a.device)
    set_threads(a.threads)
    model = load_model(a.model, dtype=parse_dtype(a.dtype), device=device)
    shape = ModelShape.from_config(model.config)
    state = state_of(model)
    mode = a.kv_mode or ("paper" if state is None else state.config.kv_mode)
    announce_backend(device)
    rows, engine = kv.measure(
        model, a.lengths(), a.widths(), kv_mode=mode, batch=a.batch, steps=a.steps
    )
    return common | {
        "setting": "16-16-16" if state is None else state.config.setting,
        "kv_mode": mode,
        "dtype": a.dtype,
        "shape": asdict(shape),
        "environment": kv.environment(device),
        **engine,
        "rows": [row.to_dict() for row in rows],
    }


def _computed(a: KVArguments) -> dict[str, Any]:
    """The result for a shape without weights."""
    shape = ModelShape.from_config(SHAPES[a.model].config())
    mode = a.kv_mode or "paper"
    note = f"computed only: {a.model} is a shape without weights"
    rows = kv.computed_rows(shape, a.lengths(), a.widths(), kv_mode=mode, batch=a.batch, note=note)
    return {"kv_mode": mode, "shape": asdict(shape), "rows": [row.to_dict() for row in rows]}


def run_kv(arguments: KVArguments) -> None:
    """Print the table or JSON; write table, JSON and plot where a folder is given."""
    if arguments.output is not None and find_spec("matplotlib") is None:
        raise ConfigError("--output: the plot needs matplotlib; pip install 'llmqat[plot]'")
    result = bench_kv(arguments)
    text = kv_report.table(result)
    if arguments.output is not None:
        folder = io.make_dir(arguments.output)
        io.write_json(folder / "kv.json", result)
        io.write_text(folder / "kv.md", text)
        kv_report.plot(result, folder / "kv.png")
        print(f"written to {folder}: kv.json, kv.md, kv.png", file=sys.stderr)
    print(json.dumps(result, allow_nan=False) if arguments.json else text, end="")


ACTIONS = {
    "kv": Action("KV memory and decode speed by sequence length", (KVArguments,), run_kv),
}
