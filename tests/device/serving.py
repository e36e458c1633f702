"""Generation: the engine by graphs, transformers' `generate` on its cache, and the commands."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

import llmqat
from llmqat import cli
from llmqat.runtime import Sampling
from llmqat_kernels import use_backend
from tests.device.registry import flow
from tests.llmqat.tiny import packed_llama, random_tokens, tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

PROMPTS = [[1, 2, 3], [4, 5], [7, 8, 9, 10]]
LAYER = {"layers": 1}
INTEGER = {"group_size": 16, "weight_scale_dtype": "integer"}
ATTENTION = "llmqat_cuda::attention_decode_quantize"
NEAR = 0.1
"""How far a token that a device chose may lie below the largest logit of its position, as a part of
what that one is above the mean: float arithmetic rounds otherwise there than on the CPU, and a code
that flips costs a step of its grid."""


@flow()
def the_engine_by_triton(place):
    place.require_native()
    same_tokens(place, packed("4-8-4", kv_mode="serving"), {"pair_matmul_kernel", ATTENTION})


@flow()
def the_engine_by_cuda(place):
    wanted = {"repacked_matmul_silu_mul", "repacked_matmul_add"}
    same_tokens(place, packed("4-8-8"), native(wanted), backend="cuda")


@flow()
def the_engine_by_cuda_on_float_activations(place):
    model = packed("4-16-16").to(torch.bfloat16)
    same_tokens(place, model, native({"repacked_linear_add"}), backend="cuda")


@flow("triton", backend="auto", wanted={"integer_group_matmul_kernel"})
@flow("cuda", backend="cuda", wanted={"llmqat_cuda::integer_group_matmul"})
def the_engine_on_integer_scales(place, *, backend, wanted):
    same_tokens(place, packed("4-8-8", **INTEGER), wanted, backend=backend)


@flow()
def the_engine_of_a_float_model_samples(place):
    """The noise is a function of record, step and seed: the same on every device."""
    same_tokens(place, tiny_llama(**LAYER), {"sample_span_kernel"}, Sampling(seed=3))


@flow("paper")
@flow("serving", kv_mode="serving")
def generate_of_transformers(place, **fields):
    """Over the quantized cache, with a padded prompt."""
    model, ids = packed("4-8-4", **fields), random_tokens(0, 2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def run(model, device):
        cache = llmqat.QuantizedCache(model)
        options = {"attention_mask": mask.to(device), "past_key_values": cache, "do_sample": False}
        return model.generate(ids.to(device), max_new_tokens=4, **options).tolist()

    expected, on_cpu = run(model, "cpu"), copy.deepcopy(model)
    with place.device():
        found = run(model.to("cuda"), "cuda")
    for row, real, tokens, wanted in zip(ids.tolist(), mask.sum(1), found, expected, strict=True):
        prompt, length = row[len(row) - int(real) :], len(row)
        same_choices(place, on_cpu, prompt, tokens[length:], wanted[length:])


@flow()
def the_commands(place):
    """Text, training, evaluation, packing, generation, as a user types them."""
    with tempfile.TemporaryDirectory() as folder:
        river(place, Path(folder))


def packed(setting, **fields):
    """A tiny model of packed linears."""
    return packed_llama(setting, variant=LAYER, **fields)


def native(operators):
    """Their names as the library registers them."""
    return {f"llmqat_cuda::{op}" for op in operators}


def same_tokens(place, model, wanted, sampling=None, backend="auto"):
    """The engine's tokens on the device, by graphs, are those of the CPU; ``wanted`` ran there."""
    if backend == "cuda":
        place.require_native()
    on_cpu = copy.deepcopy(model)
    expected = llmqat.Engine(on_cpu, max_slots=2, max_len=16).generate(PROMPTS, 4, sampling)
    replays = place.replays
    with place.device(), use_backend(backend):
        engine = llmqat.Engine(model.to("cuda"), max_slots=2, max_len=16, graphs=True)
        found = engine.generate(PROMPTS, 4, sampling)
    assert place.replays > replays
    assert wanted <= place.ran, sorted(place.ran)
    for prompt, got, want in zip(PROMPTS, found, expected, strict=True):
        tokens = got.new_tokens, want.new_tokens
        if sampling is None:
            same_choices(place, on_cpu, prompt, *tokens)
        else:
            assert tokens[0] == tokens[1]


def same_choices(place, model, prompt, found, expected):
    """The same greedy tokens; where arithmetic is not the same, others that are as good (`NEAR`),
    each after those before it.
    """
    assert len(found) == len(expected)
    if found == expected:
        return
    assert not place.exact, (found, expected)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, len(prompt) - 1 :].float()
    best = logits.amax(-1)
    chosen = logits.gather(-1, torch.tensor(found)[:, None])[:, 0]
    assert (best - chosen <= NEAR * (best - logits.mean(-1))).all(), (found, expected)


def river(place, folder):
    """Every command that takes a device, there."""
    model, data, student, text = (folder / name for name in ("model", "data", "qat", "text.txt"))
    llmqat.save_pretrained(tiny_llama(**LAYER, tied=True), model)
    save_character_tokenizer(model)
    text.write_text("a few words, and a few more of them " * 3)

    def run(command, *words, device="cuda"):
        words = [*map(str, words), "--device", device]
        with place.device():
            assert cli.main([command, *words]) == 0, (command, words)

    def export(device):
        output = folder / f"packed-{device}"
        run("export", "--model", student, "--output", output, "--verify", device=device)
        return (output / "model.safetensors").read_bytes()

    run("generate-data", "--model", model, "--output", data, "--num-records", 4, "--max-len", 8)
    run("train", "--model", model, "--data", data, "--output", student, "--bits", "4-8-4",
        "--steps", 1, "--batch-size", 1, "--grad-accum", 2, "--seq-len", 8, "--dtype", "bfloat16",
        "--fused", "--gradient-checkpointing", "--lr", "1e-3")  # fmt: skip
    run("eval", "--model", student, "--text", text, "--seq-len", 64, "--json")
    assert export("cuda") == export("cpu")
    run("generate", "--model", folder / "packed-cuda", "--prompt", "abc", "--max-new-tokens", 3)
    calibration = ("--calibration", text, "--sequences", 2, "--seq-len", 8)
    run("quantize", "--model", model, "--method", "gptq", "--bits", "4-16-16", "--output",
        folder / "gptq", *calibration)  # fmt: skip
