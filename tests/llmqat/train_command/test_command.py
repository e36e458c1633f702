"""`llmqat train` from folders to a folder: a few steps, what they leave, refusals in one line."""

from pathlib import Path

import pytest
import torch
import yaml

import llmqat
import llmqat_kernels as qk
from llmqat import cli
from llmqat.convert import state_of
from llmqat.errors import ConfigError
from llmqat.train.arguments import QuantArguments, TrainArguments
from llmqat.train.metrics import read_metrics
from llmqat.train.run import announce_backend
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.train_command.command import VOCAB, copied, run_record, short_data, train_argv

CONFIGS = Path(__file__).parents[3] / "configs"


def test_output_is_a_prepared_checkpoint(trained, model):
    student, teacher = llmqat.from_pretrained(trained), llmqat.from_pretrained(model)
    assert state_of(student).config == llmqat.QATConfig.parse("4-8-4", kv_mode="serving")
    changed = [
        not torch.equal(a, b)
        for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    ]
    assert all(changed)
    assert (trained / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_record_and_metrics(trained, model):
    record = run_record(trained)
    assert record["status"] == "complete"
    assert (record["steps"], record["config"]["kv_mode"]) == (6, "serving")
    assert record["arguments"]["model"] == str(model)
    assert record["data"]["tokens"] == 24 * 20 // 16 * 16
    assert {"torch", "transformers", "spec"} <= record["versions"].keys()
    entries = read_metrics(trained / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, 7))
    assert record["loss"] == {"first": entries[0]["loss"], "last": entries[-1]["loss"]}
    assert len((trained / "training_curve.csv").read_text().splitlines()) == 7
    # The two newest checkpoints, and tensorboard's event file.
    assert sorted(p.name for p in trained.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert list(trained.glob("runs/*/events.out.tfevents*"))


def test_health_reaches_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = trained.glob("runs/*")
    events = EventAccumulator(str(folder))
    events.Reload()
    flips = [(e.step, e.value) for e in events.Scalars("train/health/flipped")]
    expected = [
        (entry["step"], entry["health/flipped"])
        for entry in read_metrics(trained / "metrics.jsonl")
        if "health/flipped" in entry
    ]
    assert [step for step, _ in flips] == [2, 4, 6]
    assert flips == [(step, pytest.approx(value)) for step, value in expected]


def test_operators_that_plain_torch_runs_on_cuda_are_named(monkeypatch, capsys):
    choices = [qk.Choice(op, "cuda", backend, "", print)
               for op, backend in (("rope", "triton"), ("sample", "reference"))]  # fmt: skip
    monkeypatch.setattr(qk, "choices", lambda device: choices)
    announce_backend(torch.device("cuda"))
    assert capsys.readouterr().err == "cuda: plain torch (slow) runs sample: no kernel\n"
    del choices[1]
    announce_backend(torch.device("cuda"))
    assert capsys.readouterr().err == ""


def test_text_file_and_recipe(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % VOCAB}" for i in range(200)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"bits: 4-8-8\nmodel: {model}\ndata: {text}\nseq_len: 16\nsteps: 2\nlr: 1e-3\n"
        "gradient_checkpointing: true\ndtype: bfloat16\nhealth_steps: 0\nloss: label+logits\n"
    )
    output = tmp_path / "out"
    argv = ["train", "--config", str(recipe), "--output", str(output), "--kv-bits", "4"]
    assert cli.main([*argv, "--a-bits", "6", "--w-bits", "8"]) == 0
    assert "trained 8-6-4 (paper): 2 steps" in capsys.readouterr().err
    model = llmqat.from_pretrained(output)
    assert model.dtype == torch.float32
    assert state_of(model).config.setting == "8-6-4"


def test_fused_blocks(trained, model, data, tmp_path):
    """The same curve up to rounding, and what is written goes on being fused."""
    output = tmp_path / "out"
    assert cli.main(train_argv(model, data, output, "--fused", "--gradient-checkpointing")) == 0
    student = llmqat.from_pretrained(output)
    assert state_of(student).fused and not state_of(llmqat.from_pretrained(trained)).fused
    curves = [read_metrics(folder / "metrics.jsonl") for folder in (output, trained)]
    for mine, other in zip(*curves, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert mine.keys() == other.keys()  # health counts shared codes too


def test_another_teacher(model, data, tmp_path):
    """With a teacher equal to the student but for its seed, the first loss is another one."""
    other = tmp_path / "other"
    llmqat.save_pretrained(tiny_llama(seed=5, tied=True, vocab=VOCAB), other)
    firsts = []
    for teacher in (model, other):
        output = tmp_path / f"out-{teacher.name}"
        argv = train_argv(model, data, output, "--teacher", str(teacher), "--steps", "1")
        assert cli.main(argv) == 0
        firsts.append(run_record(output)["loss"]["first"])
    assert abs(firsts[0] - firsts[1]) > 0.1


BAD = [
    (("--bits", "4-8"), "bits: '4-8' is not a W-A-KV setting"),
    (("--bits", "4-8-9"), "kv_bits: 9 is not supported"),
    (("--kv-mode", "fast"), "kv_mode: 'fast' is not supported; use paper or serving"),
    (("--loss", "kl"), "loss: 'kl' is unknown"),
    (("--dtype", "float16"), "--dtype: 'float16' is not supported; use float32, bfloat16"),
    (("--device", "tpu"), "device: 'tpu'"),
    (("--batch-size", "0"), "--batch-size: 0 is not supported; use an integer of at least 1"),
    (("--lr", "nan"), "--lr: nan is not supported"),
    (("--lr", "0"), "0 trains nothing"),
    (("--seq-len", "4096"), "--seq-len: the model has 512 positions"),
    (("--seq-len", "500"), "less than one block"),
    (("--group-size", "7"), "group_size: 7 does not divide"),
    (("--threads", "0"), "threads: 0"),
    (("--model", "nowhere"), "nowhere is not a folder"),
    (("--data", "nowhere.txt"), "nowhere.txt does not exist"),
    (("--teacher", "nowhere"), "nowhere is not a folder"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_one_line(model, data, tmp_path, capsys, change, message):
    argv = train_argv(model, data, tmp_path / "out", *change)
    data_argument = dict(zip(argv[1::2], argv[2::2], strict=False))["--data"]
    if data_argument == str(data) and change == ("--seq-len", "500"):
        argv[argv.index("--data") + 1] = str(short_data(tmp_path))
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "llmqat_run.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_not_there(model, data, tmp_path, capsys):
    assert cli.main(train_argv(model, data, tmp_path / "out", "--device", "cuda")) == 1
    assert "has no CUDA; use cpu" in capsys.readouterr().err


def test_bits_are_required(model, data, tmp_path, capsys):
    argv = ["--model", str(model), "--data", str(data), "--output", str(tmp_path)]
    assert cli.main(["train", *argv]) == 1
    assert "--bits: say what to quantize" in capsys.readouterr().err
    assert cli.main(["train", *argv, "--w-bits", "4"]) == 1
    assert "--a-bits, --kv-bits neither" in capsys.readouterr().err


def test_a_prepared_model_is_no_start(trained, data, tmp_path, capsys):
    assert cli.main(train_argv(trained, data, tmp_path / "out")) == 1
    assert "is prepared (4-8-4); name a full-precision model" in capsys.readouterr().err


def test_a_run_does_not_overwrite_what_it_reads(model, data, tmp_path, capsys):
    source, records = copied(model, tmp_path, "m"), copied(data, tmp_path, "d")
    before = (source / "model.safetensors").read_bytes()
    for output, more, words in (
        (source, (), f"--output: {source} is the folder of --model"),
        (records, (), f"--output: {records} is the folder of --data"),
        (source / ".." / "m", (), "is the folder of --model"),
        (copied(model, tmp_path, "t"), ("--teacher", str(tmp_path / "t")), "folder of --teacher"),
        (copied(model, tmp_path, "o"), (), "holds a model already; name another folder"),
    ):
        assert cli.main(train_argv(source, records, output, *more)) == 1
        assert words in capsys.readouterr().err
        assert not (output / "llmqat_run.json").exists()
    assert (source / "model.safetensors").read_bytes() == before


RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "fsdp2.yaml"})  # that is accelerate's


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path):
    required = ["--model", "m", "--data", "d", "--output", "o"]
    types = (TrainArguments, QuantArguments)
    train, quantization = cli.parse_arguments("train", types, ["--config", str(path), *required])
    fields = yaml.safe_load(path.read_text())
    config = quantization.to_config()
    assert config.setting == fields["bits"]
    assert train.lr == fields["lr"]
    if path.stem.startswith("w"):
        bits = (config.w_bits, config.a_bits, config.kv_bits)
        assert path.stem == "w{}a{}kv{}".format(*bits)
        assert (train.lr, train.epochs, train.seq_len, config.kv_mode) == (2e-5, 1, 2048, "paper")
        assert train.batch_size * train.grad_accum == 8


def test_defaults_are_the_papers():
    arguments = TrainArguments("m", "d", "o")
    assert (arguments.lr, arguments.weight_decay, arguments.warmup_steps) == (2e-5, 0, 0)
    assert (arguments.epochs, arguments.max_grad_norm, arguments.seed) == (1, 1, 42)
    assert (arguments.loss, arguments.seq_len, arguments.batch_size) == ("logits", 2048, 1)


def test_optimizer_and_schedule():
    settings = TrainArguments("m", "d", "o").to_trainer(use_cpu=True, report_to="none")
    assert (settings["adam_beta2"], settings["lr_scheduler_type"]) == (0.999, "cosine")
    changed = TrainArguments("m", "d", "o", adam_beta2=0.95, lr_scheduler="linear")
    settings = changed.to_trainer(use_cpu=True, report_to="none")
    assert (settings["adam_beta2"], settings["lr_scheduler_type"]) == (0.95, "linear")
    for fields, message in (
        ({"adam_beta2": 1.0}, "--adam-beta2: 1.0 must be below 1"),
        ({"lr_scheduler": "greedy"}, "--lr-scheduler: 'greedy' is not supported"),
        ({"loss_weights": "1,2"}, "loss_weights: 2 given for the 1 terms"),
        ({"loss_layers": "first"}, "--loss-layers: 'first' is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainArguments("m", "d", "o", **fields)


def test_a_weighted_sum(model, data, tmp_path):
    more = ("--loss", "logits+hidden+attention", "--loss-weights", "1,0.5,10", "--fused")
    assert cli.main(train_argv(model, data, tmp_path, *more, "--loss-layers", "last")) == 0
    for entry in read_metrics(tmp_path / "metrics.jsonl"):
        terms = [entry[f"loss/{name}"] for name in ("logits", "hidden", "attention")]
        assert entry["loss"] == pytest.approx(terms[0] + 0.5 * terms[1] + 10 * terms[2], rel=1e-4)


def test_quantization_options():
    assert QuantArguments().to_config() is None
    config = QuantArguments(bits="4-8-4", kv_bits=8, ste_clip=2.0, group_size=32).to_config()
    assert (config.setting, config.ste_clip, config.group_size) == ("4-8-8", 2.0, 32)
    assert QuantArguments(w_bits=4, a_bits=8, kv_bits=16).to_config().setting == "4-8-16"
    with pytest.raises(ConfigError, match="--bits: not given"):
        QuantArguments(kv_mode="serving").to_config()
