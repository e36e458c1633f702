"""The one law on a device: prepared == converted == packed, bit for bit, by every backend."""

from __future__ import annotations

import copy
import tempfile

import torch

import llmqat
from llmqat.checkpoint import verify_export
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat_kernels import use_backend
from llmqat_kernels.testing import assert_same_bits
from tests.device.registry import flow
from tests.llmqat.test_parity import random_linear, served, through_disk_format
from tests.llmqat.tiny import random_tokens, tiny_llama

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@flow("triton-fp32", backend="triton")
@flow("triton-bf16", backend="triton", dtype=torch.bfloat16)
@flow("cuda-fp32", backend="cuda")
@flow("cuda-bf16", backend="cuda", dtype=torch.bfloat16)
def linears(place, *, backend, dtype=torch.float32):
    """Random small ones, prepared, packed, in the layout of a checkpoint and in the engine's: the
    outputs of the specification on the CPU.
    """
    if backend == "cuda":
        place.require_native()
    for seed in range(place.seeds):
        prepared, x = random_linear(seed, dtype)
        weight = prepared.spec.weight
        if backend == "cuda" and weight.group_size != -1 and not weight.integer_scales:
            continue  # its kernels refuse float scales of groups
        with use_backend("reference"), torch.no_grad():
            expected = prepared(x)
        with place.device(), use_backend(backend), torch.no_grad():
            prepared, x = prepared.to("cuda"), x.to("cuda")
            packed = QuantizedLinear.from_qat(prepared)
            reloaded = through_disk_format(packed)
            results = [form(x) for form in (prepared, packed, reloaded)]
            for y in (*results, served(reloaded, x)):
                assert_same_bits(y.cpu(), expected, f"seed {seed}")


@flow("triton-fp32", backend="triton")
@flow("triton-bf16-paper", backend="triton", dtype=torch.bfloat16, kv_mode="paper")
@flow("triton-fused-bf16", backend="triton", dtype=torch.bfloat16, fused=True)
@flow("triton-fused-fp32-paper", backend="triton", fused=True, kv_mode="paper")
@flow("cuda-fp32-paper", backend="cuda", kv_mode="paper")
@flow("cuda-fused-bf16", backend="cuda", dtype=torch.bfloat16, fused=True)
def models(place, *, backend, dtype=torch.float32, fused=False, kv_mode="serving"):
    """Logits of a model prepared, converted and read from the disk, and the greedy tokens; codes
    and scales are those that the CPU packs, logits those of the reference.
    """
    if backend == "cuda":
        place.require_native()
    config = llmqat.QATConfig.parse("4-8-4", kv_mode=kv_mode)
    prepared = llmqat.prepare(
        tiny_llama(4, **place.size, bias=True, dtype=dtype), config, fused=fused
    )
    packed_on_cpu = llmqat.convert(copy.deepcopy(prepared)).state_dict()
    with place.device(), tempfile.TemporaryDirectory() as folder:
        prepared.to("cuda")
        with use_backend("reference"):
            expected = logits(prepared)
        prepared.to("cpu").to("cuda")  # which forgets the codes of the weights
        with use_backend(backend):
            assert_same_bits(logits(prepared), expected, "prepared")
            packed = llmqat.convert(copy.deepcopy(prepared))
            for name, tensor in packed.state_dict().items():
                assert_same_bits(tensor.cpu(), packed_on_cpu[name], name)
            assert_same_bits(logits(packed), expected, "converted")
            llmqat.save_pretrained(packed, folder)
            verify_export(packed, folder)
            served = llmqat.from_pretrained(folder, device="cuda")
            assert_same_bits(logits(served), expected, "served")
            assert greedy(served) == greedy(prepared)


@torch.no_grad()
def logits(model):
    """Of two sequences."""
    return model(random_tokens(5, 2, 9).to("cuda"), use_cache=False).logits


def greedy(model):
    """Tokens by the library's own loop and cache."""
    return model.generate(random_tokens(6, 2, 5).to("cuda"), **GREEDY).tolist()
