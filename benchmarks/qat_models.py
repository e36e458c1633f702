"""What a training step of benchmarks/qat_slice.py is made of: models, candidates, saved bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import llmqat
import llmqat_kernels as qk
from benchmarks.eager import PaperFakeQuantize, PublishedFakeQuantize
from benchmarks.entries.linears import GRADIENTS
from llmqat.models import compat
from llmqat_kernels import nn as qnn

SETTING = "4-8-4"


@dataclass(frozen=True)
class Model:
    """Sizes of a model and of its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int
    tied: bool = False

    def build(self, device: torch.device, seed: int) -> LlamaForCausalLM:
        """Random bf16 weights on ``device``; nothing is downloaded."""
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(2048, self.tokens),
            tie_word_embeddings=self.tied,
            attn_implementation="sdpa",
        )
        torch.manual_seed(seed)
        with device:
            model = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
        compat.restore_rotary(model)  # `.to` must not round the rotary frequencies
        return model


MODELS = {
    "slice": Model(4096, 11008, 4, 32, 32, 32000, 2048),
    "smollm2": Model(576, 1536, 30, 9, 3, 49152, 2048, tied=True),
    "narrow": Model(576, 1536, 2, 9, 9, 8192, 256),
    "deep": Model(64, 128, 30, 1, 1, 256, 8),
    "tiny": Model(64, 160, 2, 2, 1, 256, 32),
}


class EagerLinear(nn.Linear):
    """Fake-quantized weight, input and (K and V) output, in plain torch operations."""

    quantizer: type[torch.autograd.Function]
    w_bits: int
    a_bits: int
    out_bits: int

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantizer.apply(x, self.a_bits)
        y = F.linear(x, self.quantizer.apply(self.weight, self.w_bits), self.bias)
        return self.quantizer.apply(y, self.out_bits) if self.out_bits else y


def make_eager(model: nn.Module, quantizer: type[torch.autograd.Function]) -> nn.Module:
    """Every linear of every block as an EagerLinear, in place."""
    config = llmqat.QATConfig.parse(SETTING)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.__class__ = EagerLinear
            module.quantizer = quantizer
            module.w_bits, module.a_bits = config.weight.bits, config.activation.bits
            is_kv = name.endswith(("k_proj", "v_proj"))
            module.out_bits = config.kv.bits if is_kv else 0
    return model


def make_llmqat(model: nn.Module, fused: bool) -> nn.Module:
    """The prepared model, in the paper's KV mode."""
    config = llmqat.QATConfig.parse(SETTING, kv_mode="paper")
    return llmqat.prepare(model, config, fused=fused)


@dataclass(frozen=True)
class Candidate:
    """What takes turns: how it is made of a model without quantization, and the operators that its
    steps compose of others (`llmqat_kernels.use_composed`).
    """

    change: Callable[[nn.Module], nn.Module]
    composed: tuple[str, ...] = ()


FUSED = "llmqat fused"
COMPOSED_GRADIENTS = f"{FUSED}, composed gradients"


def candidates() -> dict[str, Candidate]:
    """Everything that takes turns, by name."""
    fused = partial(make_llmqat, fused=True)
    return {
        "plain": Candidate(lambda model: model),
        "eager": Candidate(partial(make_eager, quantizer=PublishedFakeQuantize)),
        "eager, lean": Candidate(partial(make_eager, quantizer=PaperFakeQuantize)),
        "llmqat": Candidate(partial(make_llmqat, fused=False)),
        FUSED: Candidate(fused),
        COMPOSED_GRADIENTS: Candidate(fused, GRADIENTS),
    }


def weight_code_storages(model: nn.Module) -> set[int]:
    """Addresses of the weight codes and scales that the prepared linears keep."""
    return {
        tensor.untyped_storage().data_ptr()
        for module in model.modules()
        if hasattr(module, "weight_codes") and callable(module.weight_codes)
        for tensor in _tensors(module.weight_codes())
    }


def _tensors(value: Any) -> Iterable[Tensor]:
    return (item for item in (value if isinstance(value, tuple) else (value,)) if item is not None)


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Bytes that autograd keeps of ``forward``: ``activations``, and ``weight_codes``.

    A storage counts once, whole, however many tensors share it; parameters and buffers of the
    model do not count.
    """
    own = (*model.parameters(), *model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    codes = weight_code_storages(model)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor  # alive until all are counted: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in kept.items()}
    weights = sum(size for address, size in sizes.items() if address in codes)
    del result
    return {"activations": sum(sizes.values()) - weights, "weight_codes": weights}


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states of whole sequences. Every candidate gets SDPA's own causal mask: transformers
    would wait for the device in each forward, to look whether sequences are packed.
    """
    with mock.patch.object(modeling_llama, "create_causal_mask", lambda **_: None):
        return model.model(ids, use_cache=False).last_hidden_state


class Step:
    """A training step of one candidate."""

    def __init__(
        self,
        sizes: Model,
        candidate: Candidate,
        teacher: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.student = candidate.change(sizes.build(device, seed=0).train())
        self.composed = candidate.composed
        self.teacher = teacher
        # So small that every step does the same work on practically the same weights.
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=1e-9,
            weight_decay=0.0,
            fused=True,
            capturable=device.type == "cuda",
        )
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, sizes.vocab, (1, sizes.tokens), generator=generator)
        self.ids = ids.to(device)

    def checkpointing(self, on: bool) -> None:
        """Activation checkpointing of every block; there is no dropout whose random numbers would
        have to be the same again.
        """
        if on:
            self.student.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False}
            )
        else:
            self.student.gradient_checkpointing_disable()

    def forward(self) -> Tensor:
        """Last hidden states of the student."""
        return last_hidden(self.student, self.ids)

    def run(self) -> Tensor:
        """A whole step; returns the loss without waiting for the device."""
        with qk.use_composed(*self.composed):
            return self._run()

    def _run(self) -> Tensor:
        assert self.teacher is not None  # None: forwards only
        with torch.no_grad():
            wanted = last_hidden(self.teacher, self.ids)
        try:
            loss = qk.distillation_loss(
                self.forward(), self.student.lm_head.weight, wanted, self.teacher.lm_head.weight
            )
            loss.backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()  # half a backward that ran out of memory leaves nothing
        return loss.detach()

    def run_whole(self) -> Tensor:
        """A step as the body of one CUDA graph, or without one."""
        with qnn.whole_step():
            return self.run()

    def peak_bytes(self) -> int:
        """Memory of a step on top of what no training is without: weights, optimizer, batch (CUDA).

        Codes of weights, which outlive a step, belong to the step.
        """
        self._forget_codes()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _forget_codes(self) -> None:
        for module in self.student.modules():
            if isinstance(module, qnn.QATLinear):
                module.clear_cache()
