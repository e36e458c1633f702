"""``llmqat experiments list | run NAME | report | prune``: the paper's tables on any model."""

from __future__ import annotations

import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llmqat import io
from llmqat.commands.actions import Action
from llmqat.config import KV_MODES
from llmqat.data.store import parse_shard
from llmqat.errors import ConfigError
from llmqat.experiments.budgets import Budget, find_budget, load_budgets, parse_overrides
from llmqat.experiments.cells import Cell, expand, measured
from llmqat.experiments.costs import shape_of
from llmqat.experiments.inputs import Inputs, gather, parse_named
from llmqat.experiments.options import check_values
from llmqat.experiments.prune import find_models, prune
from llmqat.experiments.report import titles, write_report
from llmqat.experiments.results import CellLog, read_cells
from llmqat.experiments.runner import Runner, duration
from llmqat.experiments.stages import Store, in_order
from llmqat.experiments.tables import PERPLEXITY, TEXTS, Table, find_tables, load_tables

EVALUATION_TEXTS = ("wikitext2", "c4")
OUTPUT = "runs/experiments"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """Options of ``llmqat experiments run``."""

    model: str = field(
        metadata={"help": "Folder of a full-precision model, or smollm2-135m (from a package)."}
    )
    budget: str = _option("laptop", "smoke, laptop or full.")
    output: str = _option(OUTPUT, "Folder of stages and results; runs share it.")
    cache: str = _option("runs/cache", "Folder of models and texts made from packages.")
    resume: bool = _option(False, "Go on with stages that a killed run left half done.")
    restart: bool = _option(False, "Begin stages that a killed run left half done anew.")
    shard: str = _option("0/1", "i/n: every n-th cell, for several machines on one folder.")
    only: str | None = _option(None, "Cells whose name contains this pattern (* and ?).")
    seeds: str = _option("0", "Seeds, separated by commas, of rows that have any randomness.")
    kv_mode: str | None = _option(
        None, "paper, serving or both, of rows with a quantized KV cache; default: as in the table."
    )
    set: list[str] | None = field(
        default=None, metadata={"help": "Changes of the budget, such as train.steps=256."}
    )
    text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Evaluation texts: wikitext2=FILE c4=FILE; FILE may be stand-in: text of a"
            " package."
        },
    )
    train_text: list[str] | None = field(
        default=None,
        metadata={"help": "Table 3's texts: wikitext2=FILE wikitext103=FILE c4=FILE."},
    )
    tasks_dir: str | None = _option(None, "Folder of local task files for zero-shot columns.")
    generator: str | None = _option(None, "Model that writes the data; default: --model.")
    launch: str | None = _option(
        None, 'Words before training commands, such as "accelerate launch --num_processes 8".'
    )
    device: str = _option("cpu", "cpu or cuda, of every command.")
    threads: int | None = _option(None, "CPU threads of every command.")
    dry_run: bool = _option(False, "Print the commands that would run, and run none.")

    def __post_init__(self) -> None:
        if self.resume and self.restart:
            raise ConfigError("--resume, --restart: contradict each other; leave one out")
        if self.kv_mode not in (None, "both", *KV_MODES):
            raise ConfigError(f"--kv-mode: {self.kv_mode!r} is not paper, serving or both")
        parse_shard(self.shard)

    def modes(self) -> tuple[str, ...] | None:
        """The KV modes asked for."""
        if self.kv_mode is None:
            return None
        return KV_MODES if self.kv_mode == "both" else (self.kv_mode,)

    def seed_list(self) -> tuple[int, ...]:
        """The seeds.

        Raises:
            ConfigError: not numbers.
        """
        try:
            seeds = tuple(int(word) for word in self.seeds.split(","))
        except ValueError as error:
            raise ConfigError(f"--seeds: {self.seeds!r} is not like 0,1,2") from error
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ConfigError(f"--seeds: {self.seeds!r} must be different numbers of at least 0")
        return seeds


@dataclass
class ListArguments:
    """Options of ``llmqat experiments list``."""

    output: str = _option(OUTPUT, "Folder whose finished cells are counted.")


def run_list(arguments: ListArguments) -> None:
    """Print the experiments, their rows and the finished cells per model and budget."""
    done: dict[str, dict[str, int]] = {}
    records = list(read_cells(Path(arguments.output)))
    names = titles((record["model"], record["model_sha256"]) for record in records)
    for record in records:
        if record["status"] == "done":
            by = done.setdefault(record["table"], {})
            key = f"{names[record['model'], record['model_sha256']]} {record['budget']}"
            by[key] = by.get(key, 0) + 1
    for name, table in load_tables().items():
        cached = ", ".join(f"{key}: {n} done" for key, n in done.get(name, {}).items())
        done_text = f"  [{cached}]" if cached else ""
        print(f"{name:<8} {len(table.rows):3d} rows  {table.title}{done_text}")
    print("budgets: " + "; ".join(f"{b.name} ({b.description})" for b in load_budgets().values()))


def plan(name: str, arguments: RunArguments) -> tuple[list[Table], Budget, Inputs, list[Cell]]:
    """Tables, budget, inputs and cells of a run; nothing runs.

    Raises:
        ConfigError, CheckpointError, DataError: one line each.
    """
    a = arguments
    tables = find_tables(name)
    budget = find_budget(a.budget).override(parse_overrides(a.set or []))
    columns = {column for table in tables for column in measured(table, budget)}
    inputs = gather(
        a.model,
        folder=io.make_dir(a.output),
        cache=Path(a.cache),
        generator=a.generator,
        texts=parse_named("--text", a.text or [], EVALUATION_TEXTS),
        train_texts=parse_named("--train-text", a.train_text or [], TEXTS),
        needed_texts=sorted(
            c.removeprefix(PERPLEXITY) for c in columns if c.startswith(PERPLEXITY)
        ),
        needed_train_texts=sorted({r.data for t in tables for r in t.rows} & set(TEXTS)),
        tasks_dir=None if a.tasks_dir is None else Path(a.tasks_dir),
        device=a.device,
        threads=a.threads,
        launch=tuple(shlex.split(a.launch or "")),
    )
    cells = expand(tables, budget, inputs, seeds=a.seed_list(), kv_modes=a.modes(), only=a.only)
    for stage in in_order(stage for cell in cells for stage in cell.columns.values()):
        check_values(stage)
    index, count = parse_shard(a.shard)
    return tables, budget, inputs, cells[index::count]


def run_run(name: str, arguments: RunArguments) -> int:
    """Run the cells of one experiment, or of all; 1 if one of them failed."""
    a = arguments
    _, budget, inputs, cells = plan(name, a)
    root = Path(a.output)
    store = Store(root)
    if a.dry_run:
        _print_plan(cells, store)
        return 0
    _check_half_done(cells, store, a)
    context = {
        "stand_ins": dict(inputs.stand_ins),
        "overrides": list(a.set or []),
        "shape": shape_of(inputs.model.path),
    }
    log = CellLog(root, inputs.name, inputs.model.digest, budget.name, context)
    runner = Runner(root, cells, log, in_process=budget.in_process, restart=a.restart)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        summary = runner.run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    done = summary.cells - len(summary.failed)
    print(
        f"{name}: {done} of {summary.cells} cells done, {summary.stages} stages run in"
        f" {duration(summary.seconds)}; results in {root}",
        file=sys.stderr,
    )
    for cell, reason in summary.failed.items():
        print(f"failed {cell}: {reason}", file=sys.stderr)
    return 1 if summary.failed else 0


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_half_done(cells: list[Cell], store: Store, a: RunArguments) -> None:
    if a.resume or a.restart:
        return
    stages = in_order(stage for cell in cells for stage in cell.columns.values())
    begun = [stage for stage in stages if store.is_begun(stage) and not _is_locked(store, stage)]
    if begun:
        raise ConfigError(
            f"--output: {a.output} has {len(begun)} half-done stages (the first is"
            f" {begun[0].folder}); go on with --resume, or begin them anew with --restart"
        )


def _is_locked(store: Store, stage: Any) -> bool:
    from llmqat.errors import LockError
    from llmqat.experiments.stages import LOCK

    try:
        with io.Lock(store.path(stage) / LOCK):
            return False
    except LockError:
        return True


def _print_plan(cells: list[Cell], store: Store) -> None:
    for cell in cells:
        print(f"# {cell.name}" + (f": {cell.error}" if cell.error else ""))
        for stage in cell.stages:
            print(f"{'# done: ' if store.is_done(stage) else ''}{store.shown(stage)}")


@dataclass
class ReportArguments:
    """Options of ``llmqat experiments report``."""

    output: str = _option(OUTPUT, "Folder of results.")
    report: str | None = _option(None, "Folder of the report; default: report in --output.")
    model: str | None = _option(None, "Only results of the model of this name.")
    budget: str | None = _option(None, "Only results of this budget.")
    speed: list[str] | None = field(
        default=None,
        metadata={
            "help": "Measured tokens per second for figure 4, such as 16-16-16=20 4-8-8=110."
        },
    )


def run_report(arguments: ReportArguments) -> None:
    """Write the reports, and say where."""
    a = arguments
    written = write_report(
        Path(a.output),
        Path(a.report or Path(a.output) / "report"),
        model=a.model,
        budget=a.budget,
        speeds=_speeds(a.speed or []),
    )
    for path in written:
        print(f"report: {path}")


def _speeds(words: list[str]) -> dict[str, float]:
    found = {}
    for word in words:
        setting, _, value = word.partition("=")
        try:
            found[setting] = float(value)
        except ValueError as error:
            raise ConfigError(f"--speed: {word!r} is not of the form 4-8-8=110") from error
    return found


@dataclass
class PruneArguments:
    """Options of ``llmqat experiments prune``."""

    output: str = _option(OUTPUT, "Folder of stages and results.")
    dry_run: bool = _option(False, "Say what would be deleted, and delete nothing.")


def run_prune(arguments: PruneArguments) -> None:
    """Delete the models of finished stages; results and generated text stay."""
    root = Path(arguments.output)
    models = list(find_models(root)) if arguments.dry_run else prune(root)
    for model in models:
        print(f"{model.nbytes / 2**20:8.1f} MiB  {model.folder}")
    verb = "would free" if arguments.dry_run else "freed"
    print(f"prune: {verb} {sum(m.nbytes for m in models) / 2**30:.2f} GiB, {len(models)} models")


ACTIONS = {
    "list": Action("the experiments, and what is done", (ListArguments,), run_list),
    "run": Action("run one experiment, or all", (RunArguments,), run_run, ("NAME",)),
    "prune": Action(
        "free the space of models that are made again when needed", (PruneArguments,), run_prune
    ),
    "report": Action("Markdown, JSON and plots of what was run", (ReportArguments,), run_report),
}
