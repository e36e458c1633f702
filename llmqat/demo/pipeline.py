"""The demonstration: the commands a user would type, run one after the other on a small real model.

Every stage is one ``llmqat`` command in its own process (its memory goes back when it ends) and
leaves one JSON result under ``results/``. A stage whose command and result are already there is
not run again, so a killed demo resumes; ``report.py`` turns the results into tables and plots.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmqat.commands.result import last_json
from llmqat.errors import ConfigError
from llmqat.io import make_dir, write_json

PROMPT = "The history of science is"


@dataclass(frozen=True)
class Settings:
    """What the demonstration runs; the defaults are the published figures of the README."""

    output: Path
    cache: Path
    bits: str = "4-8-4"
    other_bits: str = "4-8-8"
    kv_mode: str = "serving"
    records: int = 144
    max_len: int = 256
    slots: int = 72
    steps: int = 64
    batch_size: int = 2
    seq_len: int = 256
    lr: float = 3e-4
    eval_tokens: int = 8192
    eval_seq_len: int = 512
    new_tokens: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One command; ``result`` says which JSON line of its output is kept."""

    name: str
    argv: tuple[str, ...]
    module: str = "llmqat.cli"

    @property
    def shown(self) -> str:
        """The command as a user would type it."""
        program = ("llmqat",) if self.module == "llmqat.cli" else ("python", "-m", self.module)
        return shlex.join((*program, *self.argv))


def _options(**values: object) -> tuple[str, ...]:
    """Command-line options; True is a flag."""
    words: list[str] = []
    for name, value in values.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return tuple(words)


def stages(settings: Settings, teacher: Path, text: Path) -> list[Stage]:
    """The river on ``teacher``, in order."""
    s, out = settings, settings.output
    data, qat, packed = out / "data", out / "qat", out / "packed"
    setting = _options(bits=s.bits, kv_mode=s.kv_mode)
    other_setting = _options(bits=s.other_bits, kv_mode=s.kv_mode)
    score = _options(text=text, seq_len=s.eval_seq_len, max_tokens=s.eval_tokens, json=True)
    write = _options(prompt=PROMPT, max_new_tokens=s.new_tokens, greedy=True, threads=1, json=True)
    records = _options(
        num_records=s.records, max_len=s.max_len, strategy="hybrid", slots=s.slots, seed=s.seed
    )
    steps = _options(
        lr=s.lr, steps=s.steps, batch_size=s.batch_size, seq_len=s.seq_len, seed=s.seed
    )

    def evaluate(name: str, model: Path, *extra: str) -> Stage:
        return Stage(name, ("eval", "--model", str(model), *extra, *score))

    def convert(command: str, model: Path, output: Path, *extra: str) -> Stage:
        name = command.replace("-", "_")
        return Stage(name, (command, "--model", str(model), "--output", str(output), *extra))

    return [
        evaluate("eval_full_precision", teacher),
        evaluate("eval_rtn", teacher, *setting),
        evaluate("eval_rtn_other", teacher, *other_setting),
        convert("generate-data", teacher, data, *records),
        convert("train", teacher, qat, "--data", str(data), *setting, *steps, "--resume"),
        evaluate("eval_qat", qat),
        convert("export", qat, packed, "--dtype", "bfloat16", "--verify"),
        evaluate("eval_packed", packed),
        Stage("generate", ("generate", "--model", str(packed), *write)),
        Stage("generate_full_precision", ("--model", str(teacher), *write), "llmqat.demo.baseline"),
    ]


def run_stage(stage: Stage, folder: Path) -> dict[str, Any]:
    """Run ``stage`` unless its result is there; returns ``{"command", "seconds", "output"}``.

    Raises:
        ConfigError: the command failed; its own message stands above on stderr.
    """
    path = folder / f"{stage.name}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if known.get("command") == stage.shown:
            print(f"[{stage.name}] already done in {known['seconds']:.0f} s", file=sys.stderr)
            return known
    print(f"[{stage.name}] {stage.shown}", file=sys.stderr)
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", stage.module, *stage.argv],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    if process.returncode:
        raise ConfigError(
            f"demo stage {stage.name} failed with status {process.returncode}; rerun: {stage.shown}"
        )
    result = {"command": stage.shown, "seconds": seconds, "output": last_json(process.stdout)}
    write_json(path, result)
    return result


def run_demo(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every stage in order; returns the results by stage name, assets included."""
    from llmqat.demo.assets import smollm2, wikipedia_text
    from llmqat.runtime.loading import check_positions

    folder = settings.output / "results"
    make_dir(folder)
    start = time.monotonic()
    teacher, text = smollm2(settings.cache), wikipedia_text(settings.cache)
    check_positions(teacher, "max-len", settings.max_len)
    check_positions(teacher, "seq-len", settings.seq_len)
    results: dict[str, dict[str, Any]] = {
        "assets": {
            "command": "(convert the packaged model and text)",
            "seconds": time.monotonic() - start,
            "output": None,
        }
    }
    for stage in stages(settings, teacher, text):
        results[stage.name] = run_stage(stage, folder)
    return results
