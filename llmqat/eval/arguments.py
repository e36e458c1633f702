"""Options of `llmqat eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from llmqat.errors import ConfigError
from llmqat.ptq.methods import MethodOptions
from llmqat.train.arguments import check_choice, check_number

PROTOCOLS = ("windows", "word")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class EvalArguments(MethodOptions):
    """What is measured, and on what."""

    fields_of: ClassVar[dict[str, str]] = {
        "seq_len": "calibration_seq_len",
        "batch_size": "calibration_batch_size",
    }

    model: str = field(
        metadata={
            "help": "Folder of a full-precision, prepared or packed model with its tokenizer."
        }
    )
    text: list[str] | None = field(
        default=None,
        metadata={
            "help": "UTF-8 text file, or several. A line of a .jsonl or a row of a .parquet file is"
            " a document, any other file is one; windows joins documents by an empty line."
        },
    )
    protocol: str = _option(
        "windows",
        "windows (per token, in windows of the whole text) or word (per word, document by"
        " document, as lm-eval).",
    )
    seq_len: int = _option(2048, "Tokens per window.")
    max_tokens: int | None = _option(
        None, "Use only the first tokens of a text (word: the first documents)."
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Questions through lm-eval: zero-shot (the paper's eight), mmlu, triviaqa, all,"
            " or names such as piqa,boolq."
        },
    )
    tasks_dir: str | None = _option(
        None,
        "Folder of NAME.jsonl files, or samples (the few that ship); default: the Hugging Face"
        " cache.",
    )
    limit: int | None = _option(None, "Questions per task, and per subject of MMLU.")
    shots: int | None = _option(
        None, "Examples before each question; default 0, and 5 for mmlu and triviaqa."
    )
    method: str | None = _option(
        None,
        "Quantize a full-precision model on the fly by rtn, smoothquant, gptq, awq or zeroquant,"
        " with the options of llmqat quantize.",
    )
    calibration_seq_len: int | None = _option(None, "Tokens per calibration sequence; default 512.")
    calibration_batch_size: int | None = _option(
        None, "Calibration sequences per pass; default 8, zeroquant 4."
    )
    batch_size: int = _option(1, "Windows or questions per forward pass; changes speed only.")
    device: str = _option("cpu", "cpu or cuda.")
    dtype: str = _option("float32", "Type of all that is not quantized.")
    threads: int | None = _option(None, "CPU threads; torch's default otherwise.")
    output: str | None = _option(
        None, "JSON file; written after every task, so that a failure loses one task only."
    )
    resume: bool = _option(False, "Take over the tasks that --output holds already.")
    json: bool = _option(False, "Print one JSON object on stdout.")

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_number("seq-len", self.seq_len, 2)
        check_number("batch-size", self.batch_size, 1)
        for name, low in (("max_tokens", 1), ("limit", 1), ("shots", 0)):
            value = getattr(self, name)
            if value is not None:
                check_number(name.replace("_", "-"), value, low)
        self.check_options(self.method)
        if not self.text and not self.tasks:
            raise ConfigError("--text: not given, and --tasks neither; name a text file or tasks")
        if not self.text:
            self._only("--text", protocol="windows", max_tokens=None)
        if not self.tasks:
            self._only("--tasks", tasks_dir=None, limit=None, shots=None, resume=False)
        if self.resume and self.output is None:
            raise ConfigError("--resume: needs --output, the file to go on with")

    def _only(self, flag: str, **defaults: object) -> None:
        """ConfigError for an option that differs from its default though `flag` is not given."""
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ConfigError(f"--{name.replace('_', '-')}: means nothing without {flag}")
