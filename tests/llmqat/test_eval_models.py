"""One door: a method on the fly gives the numbers of the checkpoint that it would write."""

from dataclasses import dataclass

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat import QATConfig, cli
from llmqat.errors import ConfigError
from llmqat.eval import models
from llmqat.eval.models import load_for_evaluation
from llmqat.ptq.methods import METHODS, MethodOptions
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_tokenizer import save_tokenizer

CONFIG = QATConfig.parse("4-8-4", kv_mode="serving")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    llmqat.save_pretrained(tiny_llama(tied=True, dtype=torch.bfloat16), folder)
    save_tokenizer(folder)
    ids = random_tokens(1, 1, 400).clamp(min=3)[0].tolist()
    (folder.parent / "words.txt").write_text(" ".join(f"w{i}" for i in ids))
    return folder


def _logits(model):
    with torch.no_grad():
        return model(random_tokens(2, 2, 12)).logits


@dataclass(kw_only=True)
class Options(MethodOptions):
    """As a command has them."""

    seq_len: int | None = None
    batch_size: int | None = None


CASES = [(method, "float32") for method in METHODS]
# Types differ in parameters only, some of which SmoothQuant changes.
CASES += [("rtn", "bfloat16"), ("smoothquant", "bfloat16")]


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_equals_the_packed_checkpoint(folder, tmp_path, method, dtype):
    options = Options()
    argv = ["--model", folder, "--method", method, "--output", tmp_path / "packed"]
    argv += ["--bits", "4-8-4", "--kv-mode", "serving"]
    if method != "rtn":
        words = str(folder.parent / "words.txt")
        options = Options(calibration=[words], sequences=8, seq_len=16)
        argv += ["--calibration", words, "--sequences", "8", "--seq-len", "16"]
    if method == "zeroquant":
        options.steps = 2
        argv += ["--steps", "2"]
    assert cli.main(["quantize", *map(str, argv)]) == 0
    dtype = getattr(torch, dtype)
    packed = load_for_evaluation(tmp_path / "packed", dtype=dtype)
    here = load_for_evaluation(folder, CONFIG, method=method, options=options, dtype=dtype)
    assert torch.equal(_logits(here.model), _logits(packed.model))
    assert (here.stage, packed.stage) == (method, "packed")
    assert here.config == packed.config == CONFIG
    assert (here.calibration is None) == (method == "rtn")
    assert here.model.dtype == dtype and not here.model.training


def test_stages(folder, tmp_path):
    plain = load_for_evaluation(folder)
    assert (plain.stage, plain.config) == ("full_precision", None)
    fake = load_for_evaluation(folder, CONFIG)
    assert (fake.stage, fake.config) == ("rtn", CONFIG)
    rtn = load_for_evaluation(folder, CONFIG, method="rtn")
    assert torch.equal(_logits(fake.model), _logits(rtn.model))
    llmqat.save_pretrained(fake.model, tmp_path / "prepared")
    prepared = load_for_evaluation(tmp_path / "prepared", CONFIG)
    assert (prepared.stage, prepared.config) == ("prepared", CONFIG)
    with pytest.raises(ConfigError, match="is prepared as 4-8-4 already; leave it out"):
        load_for_evaluation(tmp_path / "prepared", CONFIG, method="rtn")
    with pytest.raises(ConfigError, match="with other settings"):
        load_for_evaluation(tmp_path / "prepared", QATConfig.parse("8-8-8"))


UNPACKED = [
    ("4-8-16", {"w_quantizer": "asymmetric"}),
    ("4-8-8", {"w_quantizer": "statsq", "a_quantizer": "lsq"}),
    ("2-8-16", {"numerics": "official"}),
    ("4-4-16", {"a_group_size": 16}),
    ("4-8-6", {}),
    ("16-8-16", {}),
    ("16-16-16", {}),
]


def _calibrated(folder, **fields):
    words = str(folder.parent / "words.txt")
    return Options(calibration=[words], sequences=8, seq_len=16, **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("setting", "fields"), UNPACKED)
def test_methods_that_round_take_every_setting(folder, setting, fields, dtype):
    """Without a packed form the model stays prepared, with the numbers of `--bits` alone."""
    config, dtype = QATConfig.parse(setting, **fields), getattr(torch, dtype)
    plain = load_for_evaluation(folder, config, dtype=dtype)
    rtn = load_for_evaluation(folder, config, method="rtn", dtype=dtype)
    assert torch.equal(_logits(rtn.model), _logits(plain.model))
    assert (rtn.stage, rtn.config) == ("rtn", config) and rtn.model.dtype == dtype
    smooth = load_for_evaluation(
        folder, config, method="smoothquant", options=_calibrated(folder), dtype=dtype
    )
    assert smooth.stage == "smoothquant" and smooth.calibration["sequences"] == 8
    assert bool(_logits(smooth.model).isfinite().all())


def test_unpacked_smoothing_has_the_codes_of_the_packed(folder, monkeypatch):
    """The same setting both ways: weights that are still to be rounded keep their precision."""
    options = _calibrated(folder)
    packed = load_for_evaluation(
        folder, CONFIG, method="smoothquant", options=options, dtype=torch.bfloat16
    )
    monkeypatch.setattr(models, "_packable", lambda config: False)
    prepared = load_for_evaluation(
        folder, CONFIG, method="smoothquant", options=options, dtype=torch.bfloat16
    )
    assert torch.equal(_logits(prepared.model), _logits(packed.model))


def test_rank(folder, tmp_path):
    """A larger rank is nearer to full precision; all ranks are the weights themselves (LoRC)."""
    config = QATConfig.parse("3-16-16")
    square = tiny_llama(kv_heads=4, intermediate=64, dtype=torch.bfloat16)
    llmqat.save_pretrained(square, tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    words, folder = str(folder.parent / "words.txt"), tmp_path / "plain"
    wanted = _logits(load_for_evaluation(folder).model)
    for method, fields in (("rtn", {}), ("gptq", {}), ("zeroquant", {"steps": 2})):
        errors = []
        for rank in (None, 16, 64):
            options = Options(rank=rank, **fields)
            if method != "rtn":
                options = Options(rank=rank, calibration=[words], sequences=8, seq_len=16, **fields)
            model = load_for_evaluation(folder, config, method=method, options=options).model
            errors.append(float((_logits(model) - wanted).square().mean()))
        assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-7
    for rank, message in ((65, "rank: 65 is more than"), (0, "--rank: 0 is not supported")):
        with pytest.raises(ConfigError, match=message):
            load_for_evaluation(folder, config, method="rtn", options=Options(rank=rank))
    with pytest.raises(ConfigError, match="w_quantizer"):
        asymmetric = QATConfig.parse("4-8-8", w_quantizer="asymmetric")
        load_for_evaluation(folder, asymmetric, method="rtn", options=Options(rank=1))
    with pytest.raises(ConfigError, match="--rank: means nothing to --method awq"):
        load_for_evaluation(folder, config, method="awq", options=Options(rank=1))


def test_methods_that_choose_codes_need_the_packed_grid(folder):
    config = QATConfig.parse("4-8-8", w_quantizer="asymmetric")
    for method in ("gptq", "awq", "zeroquant"):
        with pytest.raises(ConfigError, match="asymmetric"):
            load_for_evaluation(folder, config, method=method, options=_calibrated(folder))


def test_what_is_missing(folder):
    with pytest.raises(ConfigError, match="--calibration: --method gptq looks at text"):
        load_for_evaluation(folder, CONFIG, method="gptq")
    with pytest.raises(ConfigError, match="--bits: not given; --method rtn needs"):
        load_for_evaluation(folder, method="rtn")
