"""The command line of a short run, and what it leaves."""

import json
import shutil
from pathlib import Path

VOCAB = 128


def train_argv(model, data, output, *more):
    """Six steps with a checkpoint after each second one."""
    return [
        "train", "--model", str(model), "--data", str(data), "--output", str(output),
        "--bits", "4-8-4", "--kv-mode", "serving", "--lr", "1e-3", "--steps", "6",
        "--batch-size", "2", "--seq-len", "16", "--save-steps", "2", *more,
    ]  # fmt: skip


def run_record(output):
    """The record of a run, from its folder."""
    return json.loads((output / "llmqat_run.json").read_text())


def copied(folder, tmp_path, name):
    """A copy of a folder that a test may change or overwrite."""
    return Path(shutil.copytree(folder, tmp_path / name))


def short_data(folder):
    """A data file of 99 tokens."""
    path = folder / "short.jsonl"
    path.write_text(json.dumps({"input_ids": list(range(1, 100))}) + "\n")
    return path
