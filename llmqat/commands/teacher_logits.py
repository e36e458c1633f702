"""``llmqat teacher-logits``: save the teacher's largest probabilities beside generated records, so
that training needs no teacher.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

import torch

from llmqat import __version__
from llmqat.data.reader import open_dataset
from llmqat.data.store import parse_shard
from llmqat.data.teacher import teacher_digest
from llmqat.data.teacher_logits import FOLDER, fill_logits, logit_writer
from llmqat.errors import ConfigError
from llmqat.models.heads import plain_head
from llmqat.runtime.loading import load_model, parse_device, parse_dtype, set_threads
from llmqat.state import state_of


@dataclass
class TeacherLogitsArguments:
    """Options of ``llmqat teacher-logits``."""

    model: str = field(metadata={"help": "Teacher: a folder with a full-precision model."})
    data: str = field(
        metadata={"help": "Folder of generated records; a second run continues there."}
    )
    top_k: int = field(default=64, metadata={"help": "Probabilities kept at every token."})
    precision: str = field(
        default="float16", metadata={"help": "How they are stored: float16 or float32."}
    )
    batch_size: int = field(default=4, metadata={"help": "Records computed together."})
    chunk_size: int = field(
        default=1024, metadata={"help": "Tokens whose logits exist at one time."}
    )
    shard: str = field(
        default="0/1", metadata={"help": "i/n: write the i-th of n parts of the dataset."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the teacher."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; torch's default otherwise."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object with the result."})


ARGUMENTS = (TeacherLogitsArguments,)


def run(arguments: TeacherLogitsArguments) -> None:
    """Write what is missing of this shard, then report."""
    a = arguments
    parse_shard(a.shard)
    device, dtype = parse_device(a.device), parse_dtype(a.dtype)
    set_threads(a.threads)
    dataset = open_dataset(a.data)
    teacher = load_model(a.model, dtype=dtype, device=device)
    state = state_of(teacher)
    if state is not None:
        raise ConfigError(
            f"model: {a.model} is {state.stage} ({state.config.setting}); name a full-precision"
            " teacher"
        )
    writer = logit_writer(
        dataset,
        teacher_digest(a.model),
        plain_head("model", teacher).weight.shape[0],
        top_k=a.top_k,
        precision=a.precision,
        dtype=a.dtype,
        shard=a.shard,
        versions={
            "llmqat": __version__,
            "torch": torch.__version__,
            "device": device.type,
            "batch_size": a.batch_size,
        },
    )
    with writer:
        kept = writer.stored
        summary = fill_logits(
            writer,
            dataset,
            teacher,
            top_k=a.top_k,
            precision=a.precision,
            batch_size=a.batch_size,
            chunk_size=a.chunk_size,
        )
        size = sum(path.stat().st_size for path in (writer.folder / "parts").iterdir())
        result = {
            "output": str(writer.folder),
            "records": writer.stored,
            "tokens": writer.tokens,
            "new_records": summary.records,
            "kept_records": kept,
            "new_tokens": summary.tokens,
            "rest": summary.rest,
            "bytes": size,
            "seconds": summary.seconds,
        }
    if a.json:
        print(json.dumps(result))
        return
    print(
        f"teacher logits of {result['records']} records ({summary.records} new, {kept} kept) in"
        f" {a.data}/{FOLDER}, {size / 2**20:.1f} MiB",
        file=sys.stderr,
    )
    if summary.tokens:
        print(
            f"the top {a.top_k} leave out {summary.rest:.2%} of the probability on average",
            file=sys.stderr,
        )
