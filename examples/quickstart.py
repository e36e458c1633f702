"""The whole river on a tiny random model in under a minute: generate, train, convert, pack, serve.

python examples/quickstart.py [folder]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import llmqat  # before torch: it sets passive OpenMP waiting

# isort: split
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_teacher() -> LlamaForCausalLM:
    """A random LLaMA whose next-token distribution is far from uniform, so that there is something
    to distil.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def self_written(teacher: LlamaForCausalLM, records: int, length: int) -> torch.Tensor:
    """Token ids [records, length] that the teacher samples, batched, from random first tokens."""
    engine = llmqat.Engine(teacher, max_slots=16, max_len=length)
    first = torch.randint(
        3, teacher.config.vocab_size, (records, 1), generator=torch.Generator().manual_seed(0)
    )
    outputs = engine.generate(
        first.tolist(), max_new_tokens=length - 1, sampling=llmqat.Sampling(seed=0)
    )
    return torch.tensor([out.tokens for out in outputs])


def main(folder: Path) -> None:
    """Run the river into ``folder``."""
    teacher = tiny_teacher()
    ids = self_written(teacher, 64, 64)
    student = llmqat.prepare(copy.deepcopy(teacher), llmqat.QATConfig.parse("4-8-4"))
    print(llmqat.conversion_report(student))
    arguments = llmqat.training_arguments(
        str(folder / "train"),
        learning_rate=1e-3,
        max_steps=40,
        per_device_train_batch_size=8,
        save_strategy="no",
    )
    dataset = [{"input_ids": row} for row in ids]
    llmqat.QATTrainer(student, arguments, dataset, teacher=teacher).train()

    packed_folder = folder / "packed"
    llmqat.save_pretrained(llmqat.convert(student.eval()), packed_folder)
    served = llmqat.from_pretrained(packed_folder)
    (out,) = llmqat.Engine(served, max_slots=1, max_len=64).generate([[5, 6, 7]], max_new_tokens=16)
    print("packed model continues [5, 6, 7] with", out.new_tokens)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
