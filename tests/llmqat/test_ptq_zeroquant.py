"""Layer-by-layer distillation: the target is the float block, errors never grow, runs repeat."""

import pytest
import torch

import llmqat
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare, state_of
from llmqat.errors import ConfigError
from llmqat.ptq import BlockJournal, zeroquant
from llmqat.ptq.calibration import BlockWalk
from llmqat.ptq.zeroquant import _full_precision
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-8-8", kv_mode="serving")


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_the_teacher_is_the_float_block(mode):
    tokens = random_tokens(0, 2, 12)
    plain = tiny_llama()
    student = prepare(tiny_llama(), QATConfig.parse("4-4-4", kv_mode=mode))
    walk = BlockWalk(student, tokens)
    teacher = _full_precision(student.model.layers[0])
    expected = BlockWalk(plain, tokens).run(plain.model.layers[0])
    assert torch.equal(walk.run(teacher)[0], expected[0])
    assert not torch.equal(walk.run(student.model.layers[0])[0], expected[0])


@pytest.mark.parametrize(
    ("mode", "fields"),
    [("paper", {}), ("serving", {"group_size": 16}), ("serving", {"ste_clip": 2.0})],
)
def test_better_than_rounding_and_packs(tmp_path, mode, fields):
    config = QATConfig.parse("4-8-8", kv_mode=mode, **fields)
    tokens = random_tokens(0, 8, 32)
    model = zeroquant(tiny_llama(), config, tokens, steps=30, lr=2e-3)
    assert (state_of(model).stage, state_of(model).config) == ("packed", config)
    with torch.no_grad():
        target = tiny_llama()(tokens).logits
        nearest = convert(tiny_llama(), config)(tokens).logits
        ours = model(tokens).logits
    assert (ours - target).square().mean() < 0.9 * (nearest - target).square().mean()
    llmqat.save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(llmqat.from_pretrained(tmp_path / "m")(tokens).logits, ours)


def test_a_learning_rate_that_ruins_everything_changes_nothing():
    tokens = random_tokens(0, 4, 16)
    model = zeroquant(tiny_llama(), CONFIG, tokens, steps=3, lr=100.0)
    for name, tensor in convert(tiny_llama(), CONFIG).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_only_linear_weights_are_trained():
    tokens = random_tokens(0, 4, 16)
    plain = tiny_llama(bias=True)
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    model = zeroquant(tiny_llama(bias=True), CONFIG, tokens, steps=4, lr=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
        assert parameter.grad is None
        if not name.endswith("bias"):
            assert parameter.requires_grad == flags[name]


def test_a_killed_run_goes_on_with_the_same_codes(tmp_path):
    tokens, options = random_tokens(0, 8, 16), {"steps": 5, "lr": 1e-3, "batch_size": 2}
    expected = zeroquant(tiny_llama(layers=3), CONFIG, tokens, **options)
    with BlockJournal(tmp_path / "j", {}, resume=False) as journal:
        zeroquant(tiny_llama(layers=3), CONFIG, tokens, journal=journal, **options)
    (tmp_path / "j" / "block-00001.safetensors").unlink()
    (tmp_path / "j" / "block-00002.safetensors").unlink()
    with BlockJournal(tmp_path / "j", {}, resume=True) as journal:
        resumed = zeroquant(tiny_llama(layers=3), CONFIG, tokens, journal=journal, **options)
    other = zeroquant(tiny_llama(layers=3), CONFIG, tokens, seed=1, **options)
    differs = False
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
        differs |= not torch.equal(tensor, other.state_dict()[name])
    assert differs


def test_refuses():
    tokens = random_tokens(0, 2, 8)
    for options, message in (
        ({"steps": 0}, "steps: 0"),
        ({"lr": 0.0}, "lr: 0.0"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"seed": -1}, "seed: -1"),
        ({"token_limit": 0.5}, "token_limit: 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            zeroquant(tiny_llama(), CONFIG, tokens, **options)
