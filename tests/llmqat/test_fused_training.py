"""Fused blocks from training to serving: the same bits at every stage, the engine's own, and less
kept for backward.
"""

import copy

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained, verify_export
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.models import compat
from llmqat.nn.fused import FusedDecoderLayer
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.state import state_of
from llmqat_kernels import nn as qnn
from llmqat_kernels import use_backend
from llmqat_kernels.backends import triton
from tests.llmqat.test_fused import MODES, fused
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.triton.device import DEVICE

W4A8 = QATConfig.parse("4-8-4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("setting", "variant"),
    [
        ("4-8-4", {}),
        ("8-8-8", {"bias": True, "tied": True}),
        ("4-8-16", {"dtype": torch.bfloat16}),
    ],
    ids=["w4", "w8-bias-tied", "bf16-kv16"],
)
def test_prepared_equals_converted_equals_reloaded(backend, tmp_path, mode, setting, variant):
    model = fused(9, setting, variant, kv_mode=mode)
    tokens = random_tokens(3, 1, 8)
    with torch.no_grad():
        expected = model(tokens).logits
        save_pretrained(model, tmp_path / "prepared")
        again = from_pretrained(tmp_path / "prepared")
        assert torch.equal(again(tokens).logits, expected)
        packed = convert(model)
        assert torch.equal(packed(tokens).logits, expected)
        save_pretrained(packed, tmp_path / "packed")
        served = from_pretrained(tmp_path / "packed")
        assert torch.equal(served(tokens).logits, expected)
    for other in (again, served):
        assert sum(isinstance(m, FusedDecoderLayer) for m in other.modules()) == 2
    assert sum(isinstance(m, QuantizedLinear) for m in served.modules()) == 14
    assert state_of(served) == state_of(packed) and state_of(again).fused
    verify_export(packed, tmp_path / "packed")


def engine_attention(module, query, key, value, mask, scaling=None, **_):
    """The engine's attention over a float cache, for left-aligned causal tokens."""
    batch, heads, length, dim = query.shape
    total = key.shape[2]
    table, none = torch.zeros(total, dim // 2), torch.zeros(0)
    mixed = torch.ops.llmqat.attention_decode(
        query.transpose(1, 2).reshape(-1, heads, dim),
        *(key.contiguous(), none, value.contiguous(), none),
        *(table, table),
        torch.arange(batch).repeat_interleave(length),
        torch.arange(total - length + 1, total + 1).repeat(batch),
        *(scaling, 16, False),
    )
    return mixed.view(batch, length, heads, dim), None


@pytest.mark.parametrize("mode", MODES)
def test_only_attention_and_head_differ_from_the_engine(mode):
    """Norms, activations, rotations, codes and scales are the engine's own bits: with its attention
    the fused model's residual stream is the engine's, where an unfused model's is not.
    """
    compat.register_attention("engine", engine_attention)
    variant = {"heads": 6, "kv_heads": 2, "intermediate": 256, "layers": 3}
    model = convert(fused(11, "4-8-8", variant, kv_mode=mode)).eval()
    model.set_attn_implementation("engine")
    tokens = random_tokens(8, 1, 12)
    with use_backend("reference"), torch.no_grad():
        engine = llmqat.Engine(model, max_slots=1, max_len=16)
        positions = torch.arange(12)
        forward = engine.forward
        stream = forward(tokens[0], torch.zeros(12, dtype=torch.int64), positions)
        hidden = model.model(tokens, use_cache=False).last_hidden_state[0]
        normed = forward.kernels.rms_norm(stream, forward.weights.norm, forward.weights.norm_eps)
    assert torch.equal(hidden, normed)


def test_a_packed_model_has_no_gradient():
    model = convert(fused())
    with pytest.raises(RuntimeError, match="no gradient"):
        model(random_tokens(0, 1, 5)).logits.sum().backward()


# Cost


def block_bytes(model, hidden, tables):
    """Bytes of distinct storages that the first block keeps for backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, qnn.QATLinear):
            weights |= {t.untyped_storage().data_ptr() for t in module.weight_codes()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    block = model.model.layers[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(hidden, position_embeddings=tables, attention_mask=None)
    assert out.requires_grad  # and alive: its graph holds what was kept
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_activations(dtype):
    """A fused block keeps two thirds of what the same block without quantization keeps."""
    options = {"heads": 8, "kv_heads": 4, "intermediate": 384, "layers": 1, "dtype": dtype}
    plain = tiny_llama(0, **options)
    hidden = torch.randn(2, 64, 128, dtype=dtype, requires_grad=True)
    tables = plain.model.rotary_emb(hidden, torch.arange(64)[None])
    base = block_bytes(plain, hidden, tables)
    unfused = block_bytes(prepare(copy.deepcopy(plain), W4A8), hidden, tables)
    model = prepare(plain, W4A8, fused=True)
    assert block_bytes(model, hidden, tables) < 2 / 3 * base < unfused


# The same curve on every backend


def train(steps, layers, device):
    """Losses of a distillation: layers of width 32, 2 x 3 tokens a step, AdamW."""
    teacher, student = (
        tiny_llama(seed, heads=2, kv_heads=1, intermediate=64, layers=layers).to(device)
        for seed in (20, 21)
    )
    prepare(student, W4A8, fused=True).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    tokens, losses = random_tokens(0, 2, 3).to(device), []
    with torch.no_grad():
        target = teacher(tokens).logits
    for _ in range(steps):
        logits = student(tokens, use_cache=False).logits
        loss = qk.distillation_loss_logits(logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def curve(backend, *run):
    with use_backend(backend):
        return train(*run)


def same_curve(backend, steps, layers=2, device="cpu"):
    run = steps, layers, device
    expected, got = curve("reference", *run), curve(backend, *run)
    assert expected[-1] < expected[0] - 0.01 * steps
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert abs(a - b) <= 1e-4 * abs(a), step


def test_the_loss_curve_is_the_same_on_cpu():
    same_curve("cpu", 50)


TRITON = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(triton.why_not()), reason=f"triton: {triton.why_not()}"),
]
HOURS = [pytest.mark.slow, pytest.mark.timeout(3600)] if triton.interpreting() else []


@pytest.mark.parametrize(
    ("steps", "layers"),
    [pytest.param(2, 2, marks=TRITON), pytest.param(50, 1, marks=[*TRITON, *HOURS])],
)
def test_the_loss_curve_is_the_same_on_triton(steps, layers):
    same_curve("triton", steps, layers, DEVICE)
