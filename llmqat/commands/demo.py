"""``llmqat demo``: the whole river on SmolLM2-135M, with a report and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmqat.config import KV_MODES, QATConfig
from llmqat.demo.pipeline import Settings, run_demo
from llmqat.demo.report import headline, write_report
from llmqat.errors import ConfigError
from llmqat.train.arguments import check_choice, check_number

LOWEST = {
    "records": 1, "max_len": 2, "steps": 1, "batch_size": 1, "seq_len": 2, "eval_tokens": 2,
    "seed": 0,
}  # fmt: skip


@dataclass
class DemoArguments:
    """Options of ``llmqat demo``."""

    output: str = field(
        default="runs/demo", metadata={"help": "Folder of the results; a second run resumes there."}
    )
    cache: str = field(
        default="runs/cache", metadata={"help": "Folder of the converted model and text."}
    )
    bits: str = field(default="4-8-4", metadata={"help": "W-A-KV setting that is trained."})
    kv_mode: str = field(default="serving", metadata={"help": "KV cache mode: paper or serving."})
    records: int = field(
        default=Settings.records, metadata={"help": "Records that the model writes for itself."}
    )
    max_len: int = field(default=Settings.max_len, metadata={"help": "Longest record, in tokens."})
    steps: int = field(default=Settings.steps, metadata={"help": "QAT steps."})
    batch_size: int = field(default=Settings.batch_size, metadata={"help": "Sequences per step."})
    seq_len: int = field(
        default=Settings.seq_len, metadata={"help": "Tokens per training sequence."}
    )
    lr: float = field(default=Settings.lr, metadata={"help": "Peak learning rate."})
    eval_tokens: int = field(
        default=Settings.eval_tokens, metadata={"help": "Tokens of text that are scored."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data generation and training."})

    def __post_init__(self) -> None:
        """Refuse now what a stage would refuse after the minutes of those before it."""
        for name, low in LOWEST.items():
            check_number(name.replace("_", "-"), getattr(self, name), low)
        check_number("lr", self.lr, 0, whole=False)
        if self.lr == 0:
            raise ConfigError("--lr: 0 trains nothing; give a positive number")
        check_choice("kv-mode", self.kv_mode, KV_MODES)
        try:
            QATConfig.parse(self.bits).check_packable()
        except ConfigError as error:
            raise ConfigError(f"--bits: {self.bits}: {error}") from error


ARGUMENTS = (DemoArguments,)


def run(arguments: DemoArguments) -> None:
    """Run every stage, write the report, print its headline."""
    from llmqat.demo.assets import smollm2

    options = vars(arguments) | {"output": Path(arguments.output), "cache": Path(arguments.cache)}
    settings = Settings(**options)
    results = run_demo(settings)
    report = write_report(results, settings, smollm2(settings.cache))
    print(f"report: {settings.output / 'report.md'}")
    print(headline(report))
