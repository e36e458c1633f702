"""What users do on a GPU, on the twin device, beside the same on the CPU.

    python -m tests.twin.flows DEVICE.so

DEVICE.so is device.cpp, compiled. Prints a line of JSON for each flow: its name and the error, or
null.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
if __name__ == "__main__":  # before torch looks for a device
    ctypes.CDLL(sys.argv[1])
    gc.disable()  # as in tests/conftest.py

import torch

import llmqat
import llmqat_kernels as qk
from llmqat import cli
from llmqat.runtime import Sampling
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer
from tests.twin import cuda, graphs, tensors

PROMPTS = [[1, 2, 3], [4, 5], [7, 8, 9, 10]]
FLOWS = {}


def flow(function):
    """Add a flow."""
    FLOWS[function.__name__] = function
    return function


def ran(*names):
    """Assert that kernels ran on the device in this flow."""
    assert tensors.RAN.issuperset(names), sorted(tensors.RAN)


@flow
def two_devices_do_not_mix():
    with tensors.device():
        x = torch.ones(3, device="cuda")
        assert x.is_cuda and x.device == tensors.CUDA and (x + 1).device == x.device
        assert type(x.cpu()) is torch.Tensor and (x * torch.tensor(2.0)).tolist() == [2.0] * 3
        for mix in (lambda: x + torch.ones(3), lambda: torch.ops.llmqat.int_matmul(*codes(x))):
            try:
                mix()
            except RuntimeError as error:
                assert "on the CPU" in str(error)
            else:
                raise AssertionError("operands on two devices were taken")


def codes(x):
    """Codes of activations on the device, of a weight on the CPU."""
    return qk.quantize(x[None], 8)[0], torch.ones(4, 3, dtype=torch.int8), 8


@flow
def a_capture_computes_nothing_and_refuses_to_wait():
    with tensors.device():
        x, taken = torch.zeros(2, device="cuda"), graphs.CUDAGraph()
        with graphs.graph(taken):
            x.add_(1)
        assert x.tolist() == [0, 0]
        taken.replay()
        taken.replay()
        assert x.tolist() == [2, 2]
        try:
            with graphs.graph(taken):
                float(x[0])
        except RuntimeError as error:
            assert "while a graph is captured" in str(error)
        else:
            raise AssertionError("a captured value was read")


def trained(device, **options):
    """The student after a step of distillation, and its loss."""
    student, teacher = (tiny_llama(layers=1).to(device) for _ in range(2))
    fused = options.pop("fused", False)
    llmqat.prepare(student.train(), llmqat.QATConfig.parse("4-8-4", **options), fused=fused)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    ids = random_tokens(0, 2, 8).to(device)
    with torch.no_grad():
        wanted = teacher.model(ids, use_cache=False).last_hidden_state
    hidden = student.model(ids, use_cache=False).last_hidden_state
    heads = student.lm_head.weight, teacher.lm_head.weight
    loss = qk.distillation_loss(hidden, heads[0], wanted, heads[1])
    loss.backward()
    optimizer.step()
    return student, float(loss)


def same_training(**options):
    """A step on the twin and on the CPU: the loss is that of the same codes."""
    _, expected = trained("cpu", **options)
    with tensors.device():
        student, loss = trained("cuda", **options)
        assert all(parameter.grad.is_cuda for parameter in student.parameters())
    assert abs(loss / expected - 1) < 1e-4, (loss, expected)


@flow
def a_training_step():
    same_training()
    ran("int8_matmul_kernel", "float_matmul_codes_kernel")


@flow
def a_fused_training_step():
    same_training(fused=True, kv_mode="serving")
    ran("silu_mul_quantize_kernel", "silu_mul_backward_kernel")


def same_tokens(model, sampling=None, backend="auto", **options):
    """Tokens of the engine on the twin, by graphs, and on the CPU."""
    arguments = PROMPTS, 4, sampling
    expected = llmqat.Engine(model, max_slots=2, max_len=16).generate(*arguments)
    replays = graphs.TAPE.replays
    with tensors.device(), qk.use_backend(backend):
        engine = llmqat.Engine(model.to("cuda"), max_slots=2, max_len=16, graphs=True, **options)
        found = engine.generate(*arguments)
    assert [x.new_tokens for x in found] == [x.new_tokens for x in expected]
    assert graphs.TAPE.replays > replays


def packed(setting, **options):
    model = tiny_llama(layers=1)
    return llmqat.convert(llmqat.prepare(model, llmqat.QATConfig.parse(setting, **options)))


@flow
def the_engine_by_triton():
    same_tokens(packed("4-8-4", kv_mode="serving"))
    ran("pair_matmul_kernel", "llmqat_cuda::attention_decode_quantize")


@flow
def the_engine_by_cuda():
    same_tokens(packed("4-8-8"), backend="cuda")
    ran("llmqat_cuda::repacked_matmul_silu_mul", "llmqat_cuda::repacked_matmul_add")


@flow
def the_engine_by_cuda_on_float_activations():
    same_tokens(packed("4-16-16").to(torch.bfloat16), backend="cuda")
    ran("llmqat_cuda::repacked_linear_add")


@flow
def integer_scales_of_groups():
    groups = {"group_size": 16, "weight_scale_dtype": "integer"}
    same_training(fused=True, **groups)
    model = packed("4-8-8", **groups)
    same_tokens(model)
    ran("integer_group_matmul_kernel")
    same_tokens(model.to("cpu"), backend="cuda")
    ran("llmqat_cuda::integer_group_matmul")


@flow
def the_engine_of_a_float_model_samples():
    same_tokens(tiny_llama(layers=1), Sampling(seed=3))
    ran("sample_span_kernel")


@flow
def generate_of_transformers():
    model, ids = packed("4-8-4"), random_tokens(0, 2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def run(model, ids, mask):
        cache = llmqat.QuantizedCache(model)
        options = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
        return model.generate(ids, max_new_tokens=4, **options).tolist()

    expected = run(model, ids, mask)
    with tensors.device():
        assert run(model.to("cuda"), ids.to("cuda"), mask.to("cuda")) == expected


@flow
def the_commands():
    with tempfile.TemporaryDirectory() as folder:
        river(Path(folder))


def river(folder):
    """Text, training, evaluation, packing, generation, as a user types them."""
    model, data, student, text = (folder / name for name in ("model", "data", "qat", "text.txt"))
    llmqat.save_pretrained(tiny_llama(layers=1, tied=True), model)
    save_character_tokenizer(model)
    text.write_text("a few words, and a few more of them " * 3)

    def run(command, *words, device=True):
        words = [str(word) for word in words] + (["--device", "cuda"] if device else [])
        with tensors.device():
            assert cli.main([command, *words]) == 0, (command, words)

    run("generate-data", "--model", model, "--output", data, "--num-records", 2, "--max-len", 8)
    run("train", "--model", model, "--data", data, "--output", student, "--bits", "4-8-4",
        "--steps", 1, "--batch-size", 1, "--seq-len", 8, "--dtype", "bfloat16")  # fmt: skip
    run("eval", "--model", student, "--text", text, "--seq-len", 64, "--json")
    run("export", "--model", student, "--output", folder / "packed", "--verify", device=False)
    run("generate", "--model", folder / "packed", "--prompt", "abc", "--max-new-tokens", 3)
    calibration = ("--calibration", text, "--sequences", 2, "--seq-len", 8)
    run("quantize", "--model", model, "--method", "gptq", "--bits", "4-16-16", "--output",
        folder / "gptq", *calibration)  # fmt: skip


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)
    cuda.install()
    for name, function in FLOWS.items():
        error = None
        tensors.RAN.clear()
        try:
            function()
        except BaseException:  # SystemExit of a command too
            error = traceback.format_exc()
        print(json.dumps({"flow": name, "error": error}), flush=True)
