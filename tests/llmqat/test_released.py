"""The importer: codes of the released code, value for value, with 128 clamped and counted."""

import json

import pytest
import torch
from tiny import random_tokens, tiny_llama
from tiny_families import tiny_model
from torch import nn

from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.checkpoint.released import import_released, released_codes
from llmqat.cli import main
from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat_kernels import fake_quantize_official
from llmqat_kernels.spec.quantize import row_codes, row_scale

pytestmark = pytest.mark.usefixtures("on_reference")


def released_model(seed=0, **fields):
    """A LLaMA in bfloat16, as that code saves it."""
    return tiny_llama(seed, dtype=torch.bfloat16, **fields)


def gaussian(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16) * 0.02


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_values_are_those_of_the_released_code(bits):
    weight = gaussian(512, 256)
    codes, scale, beyond = released_codes(weight, bits)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    expected = fake_quantize_official(weight, bits)
    ours = (codes.float() * scale[:, None]).to(torch.bfloat16)
    # Our scale is the reciprocal of its divisor: one more rounding in fp32, far below bfloat16.
    equal = ours == expected
    assert equal[beyond == 0].float().mean() > 0.999
    # A clamped code costs one step of 128, and the rounding of both.
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0.012, atol=0)


def test_code_128_is_clamped_and_counted():
    """About a sixth of rows at 8 bits (paper.md 1.12, D3); at 4 bits none."""
    weight = gaussian(2048, 256, seed=1)
    codes, _, beyond = released_codes(weight, 8)
    assert 0.1 < (beyond > 0).float().mean() < 0.25
    assert int(codes.min()) >= -127
    assert int(released_codes(weight, 4)[2].sum()) == 0
    # The codes differ from ours on purpose: in few weights at 4 bits, in many at 8.
    for bits, low, high in ((4, 0.0005, 0.01), (8, 0.03, 0.15)):
        own = row_codes(weight.float(), row_scale(weight.float(), bits), bits)
        share = (own != released_codes(weight, bits)[0]).float().mean()
        assert low < share < high


def test_a_row_by_hand():
    """max 1: s = 127 / 1.000001 -> 127 in bfloat16; 0.5 x 127 = 63.5, 64 to even; 1 -> 127."""
    weight = torch.tensor([[1.0, 0.5, -1.0, 0.0], [0.0] * 4], dtype=torch.bfloat16)
    codes, scale, beyond = released_codes(weight, 8)
    assert codes.tolist() == [[127, 64, -127, 0], [0] * 4]
    assert scale.tolist() == [pytest.approx(1 / 127), 1.0] and beyond.tolist() == [0, 0]
    half = released_codes(torch.zeros(1, 4, dtype=torch.float16), 8)
    assert half[0].tolist() == [[0] * 4] and half[1].tolist() == [1.0]


def test_arithmetic_is_bfloat16_where_that_holds_the_weights():
    weight = gaussian(64, 64)
    for stored in (weight.float(), weight):
        assert torch.equal(released_codes(stored, 8)[0], released_codes(weight, 8)[0])
    exact = weight.float() + 1e-6
    assert int(released_codes(exact, 8)[2].sum()) == 0  # fp32 has no code 128


def test_import_packs_what_it_says(tmp_path):
    model = released_model()
    weights = {n: m.weight.detach().clone() for n, _, m in iter_linears(model, find_family(model))}
    report = import_released(model, QATConfig.parse("8-8-8"))
    beyond = 0
    for name, _, module in iter_linears(model, find_family(model)):
        codes, scale, row = released_codes(weights[name], 8)
        beyond += int(row.sum())
        assert torch.equal(module.weight_codes, codes) and torch.equal(module.weight_scale, scale)
    assert report.clamped_codes == beyond > 0
    assert report.weights == sum(weight.numel() for weight in weights.values())
    assert 0 < report.clamped_rows <= report.rows == sum(len(weight) for weight in weights.values())
    save_pretrained(model, tmp_path / "m")
    loaded, x = from_pretrained(tmp_path / "m"), random_tokens(0, 1, 8)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_export_released(tmp_path, capsys):
    released_model().save_pretrained(tmp_path / "theirs")
    base = ["export", "--model", str(tmp_path / "theirs"), "--output", str(tmp_path / "packed")]
    assert main([*base, "--released"]) == 1
    assert "--bits" in capsys.readouterr().err
    assert main([*base, "--released", "--bits", "2-8-16", "--verify"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "llmqat eval --numerics official --bits 2-..." in error
    assert not (tmp_path / "packed").exists()
    assert main([*base, "--released", "--bits", "8-8-4", "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["setting"] == "8-8-4" and result["released"]["clamped_codes"] > 0
    assert result["verified"]["tensors"] > 0
    assert main([*base, "--released", "--bits", "4-8-4"]) == 0
    assert "0 of" in capsys.readouterr().out


def test_what_cannot_be_imported():
    config = QATConfig.parse("4-8-4")
    for model, settings, message in (
        (tiny_model("gpt2"), config, "not trained by the released code"),
        (prepare(released_model(), config), config, "without --released"),
        (released_model(), QATConfig.parse("4-8-4", group_size=16), "group_size"),
        (released_model(), QATConfig.parse("16-8-4"), "w_bits"),
        (released_model(), QATConfig.parse("2-8-16"), "w_bits: .* StatsQ"),
        (nn.Linear(2, 2), config, "not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_released(model, settings)
    with pytest.raises(ConfigError, match=r"w_bits: .* StatsQ"):
        released_codes(gaussian(4, 8), 2)
    broken = released_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: weight has NaN"):
        import_released(broken, config)
