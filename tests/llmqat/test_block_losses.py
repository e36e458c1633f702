"""The losses between decoder blocks, against what the library returns with eager attention."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.train import block_losses
from llmqat.train.block_losses import attention_divergence, hidden_distance
from llmqat.train.observe import BlockObserver
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import build_trainer, logged

pytestmark = pytest.mark.usefixtures("on_reference")
SUM = "logits+hidden+attention"


def _students():
    for mode in ("paper", "serving"):
        config = QATConfig.parse("4-8-4", kv_mode=mode)
        yield mode, prepare(tiny_llama(), config)
        yield f"{mode} fused", prepare(tiny_llama(), config, fused=True)


STUDENTS = dict(_students())


def _eager_quantized(module, query, key, value, mask, **named):
    quantizer = getattr(module, "llmqat_kv", None)
    if quantizer is not None:
        key, value = quantizer(key), quantizer(value)
    return eager_attention_forward(module, query, key, value, mask, **named)


def _library(model, **inputs):
    """Block outputs and attention maps as transformers returns them."""
    AttentionInterface.register("test_eager", _eager_quantized)
    AttentionMaskInterface.register("test_eager", eager_mask)
    model = copy.deepcopy(model)
    model.set_attn_implementation("test_eager")
    hidden, maps = [], []
    for block in model.model.layers:
        block.self_attn._forward_pre_hooks.clear()  # what refuses functions that do not quantize
        block.register_forward_hook(lambda module, args, out: hidden.append(out))
        block.self_attn.register_forward_hook(lambda module, args, out: maps.append(out[1]))
    with torch.no_grad():
        model(**inputs)
    return hidden, maps


def _kl(student, teacher):
    """Mean over heads, [B, T]."""
    log = teacher.clamp(min=1e-30).log() - student.clamp(min=1e-30).log()
    return (teacher * log).sum(-1).mean(1)


def _states(model, **inputs):
    observer = BlockObserver("model", model, None, hidden=True, attention=True)
    with observer.watch() as states:
        model(**inputs)
    return states


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", STUDENTS)
def test_values_are_those_of_the_librarys_maps(name, padded, monkeypatch):
    monkeypatch.setattr(block_losses, "_MAP_ELEMENTS", 100)  # one or two rows at a time
    student, teacher = STUDENTS[name], tiny_llama(seed=1)
    inputs = {"input_ids": random_tokens(0, 2, 9)}
    valid = None
    if padded:
        valid = torch.ones(2, 9, dtype=torch.bool)
        valid[1, 6:] = False
        inputs["attention_mask"] = valid.long()
    own, other = _states(student, **inputs), _states(teacher, **inputs)
    (h, p), (ht, pt) = _library(student, **inputs), _library(teacher, **inputs)
    rows = torch.ones(2, 9, dtype=torch.bool) if valid is None else valid
    mse = torch.stack([(a - b).square().mean(-1)[rows].mean() for a, b in zip(h, ht, strict=True)])
    assert hidden_distance(own, other, valid).item() == pytest.approx(mse.mean().item(), rel=1e-5)
    kl = torch.stack([_kl(s, t)[rows].mean() for s, t in zip(p, pt, strict=True)])
    result = attention_divergence(own, other, valid)
    assert result.item() == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.dtype == torch.float32


def test_a_perfect_student_loses_nothing():
    states = _states(tiny_llama(), input_ids=random_tokens(0, 2, 9))
    assert hidden_distance(states, states, None).item() == 0
    assert abs(attention_divergence(states, states, None).item()) < 1e-6


@pytest.mark.parametrize("name", STUDENTS)
def test_gradient_checkpointing_changes_nothing(tmp_path, name):
    """Blocks that are recomputed in backward give the same run, terms included."""
    for mode in ("off", "on"):
        build_trainer(
            tmp_path / mode,
            steps=2,
            student=copy.deepcopy(STUDENTS[name]),
            teacher=tiny_llama(),
            loss=SUM,
            gradient_checkpointing=mode == "on",
        ).train()
    assert logged(tmp_path / "on") == logged(tmp_path / "off")


def test_terms_are_logged_and_add_up(tmp_path):
    build_trainer(
        tmp_path,
        steps=4,
        loss="attention+logits+hidden",
        loss_weights=[2.0, 1.0, 0.5],
        loss_layers="last",
        gradient_accumulation_steps=2,
        logging_steps=2,
        health_steps=0,
        save_steps=100,
    ).train()
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        total = entry["loss/logits"] + 0.5 * entry["loss/hidden"] + 2 * entry["loss/attention"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    build_trainer(tmp_path / "one", steps=1).train()
    assert not any(key.startswith("loss/") for key in logged(tmp_path / "one")[0])


@pytest.mark.parametrize("loss", ["hidden", "attention"])
def test_each_pulls_the_student_to_the_teacher(tmp_path, loss):
    ids = random_tokens(9, 2, 24)
    data = [{"input_ids": row} for row in ids] * 12
    build_trainer(tmp_path, steps=12, data=data, loss=loss, save_steps=100).train()
    losses = [entry["loss"] for entry in logged(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_bf16_autocast(tmp_path):
    half = tiny_llama(tied=True).bfloat16()
    for name, options in (("bf16", {"teacher": half, "bf16": True}), ("fp32", {})):
        student = prepare(tiny_llama(tied=True), QATConfig.parse("4-8-4", kv_mode="serving"))
        build_trainer(tmp_path / name, steps=1, student=student, loss=SUM, **options).train()
    one, other = (logged(tmp_path / name)[0] for name in ("bf16", "fp32"))
    for term in ("loss/logits", "loss/hidden", "loss/attention"):
        assert one[term] == pytest.approx(other[term], rel=0.1)


def test_refusals():
    ids = {"input_ids": random_tokens(0, 1, 5)}
    one, other = _states(tiny_llama(), **ids), _states(tiny_llama(heads=2), **ids)
    with pytest.raises(ConfigError, match="hidden needs a teacher of the student's hidden size 64"):
        hidden_distance(one, other, None)
    with pytest.raises(ConfigError, match="attention needs a teacher of the student's 4 heads"):
        attention_divergence(one, other, None)
