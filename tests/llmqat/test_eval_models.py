"""One door: a method on the fly gives the numbers of the checkpoint that it would write."""

from dataclasses import dataclass

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat import QATConfig, cli
from llmqat.errors import ConfigError
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


def test_fake_quantization_only(folder):
    """What the packed format cannot hold is evaluated without a method, and refused with one."""
    config = QATConfig.parse("4-8-8", w_quantizer="asymmetric")
    assert load_for_evaluation(folder, config).config == config
    with pytest.raises(ConfigError, match="asymmetric"):
        load_for_evaluation(folder, config, method="rtn")
    with pytest.raises(ConfigError, match="--calibration: --method gptq looks at text"):
        load_for_evaluation(folder, CONFIG, method="gptq")
    with pytest.raises(ConfigError, match="--bits: not given; --method rtn needs"):
        load_for_evaluation(folder, method="rtn")
