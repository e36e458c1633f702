"""The demonstration: the commands a user would type, run one after the other on a small real model.

Every stage is one ``llmqat`` command in its own process (its memory goes back when it ends) and leaves one
JSON result under ``results/``. A stage whose command and result are already there is not run again, so a killed demo
resumes; ``report.py`` turns the results into tables and plots.
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
    records: int = 192
    max_len: int = 256
    slots: int = 96
    steps: int = 64
    batch_size: int = 2
    seq_len: int = 384
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


def stages(settings: Settings, teacher: Path, text: Path) -> list[Stage]:
    """The river on ``teacher``, in order."""
    s, out = settings, settings.output
    kv = ("--kv-mode", s.kv_mode)
    evaluate = (
        "eval", "--text", str(text), "--seq-len", str(s.eval_seq_len), "--max-tokens", str(s.eval_tokens), "--json",
    )  # fmt: skip
    generate = (
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        str(s.new_tokens),
        "--greedy",
        "--threads",
        "1",
        "--json",
    )
    return [
        Stage("eval_full_precision", (*evaluate, "--model", str(teacher))),
        Stage("eval_rtn", (*evaluate, "--model", str(teacher), "--bits", s.bits, *kv)),
        Stage("eval_rtn_other", (*evaluate, "--model", str(teacher), "--bits", s.other_bits, *kv)),
        Stage(
            "generate_data",
            ("generate-data", "--model", str(teacher), "--output", str(out / "data"), "--num-records", str(s.records),
             "--max-len", str(s.max_len), "--strategy", "hybrid", "--slots", str(s.slots), "--seed", str(s.seed)),
        ),
        Stage(
            "train",
            ("train", "--model", str(teacher), "--data", str(out / "data"), "--bits", s.bits, *kv,
             "--output", str(out / "qat"), "--lr", str(s.lr), "--steps", str(s.steps),
             "--batch-size", str(s.batch_size), "--seq-len", str(s.seq_len), "--seed", str(s.seed)),
        ),
        Stage("eval_qat", (*evaluate, "--model", str(out / "qat"))),
        Stage(
            "export",
            ("export", "--model", str(out / "qat"), "--output", str(out / "packed"), "--dtype", "bfloat16", "--verify"),
        ),
        Stage("eval_packed", (*evaluate, "--model", str(out / "packed"))),
        Stage("generate", ("generate", "--model", str(out / "packed"), *generate)),
        Stage("generate_full_precision", ("--model", str(teacher), *generate), "llmqat.demo.baseline"),
    ]  # fmt: skip


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
    result = {"command": stage.shown, "seconds": seconds, "output": _last_json(process.stdout)}
    write_json(path, result)
    return result


def _last_json(text: str) -> Any:
    """The last JSON object printed, or None for a stage that prints prose."""
    for line in reversed(text.strip().splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def run_demo(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every stage in order; returns the results by stage name, assets included."""
    from llmqat.demo.assets import smollm2, wikipedia_text

    folder = settings.output / "results"
    make_dir(folder)
    start = time.monotonic()
    teacher, text = smollm2(settings.cache), wikipedia_text(settings.cache)
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
