"""Every format runs offline; results, averages and refusals of the suite."""

import json
import shutil
import sys

import pytest
from transformers import AutoTokenizer

import llmqat_kernels as qk
from llmqat import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError, DataError
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install llmqat[eval]")

import datasets

from llmqat.eval.tasks import TASKS, ZERO_SHOT, TaskSuite, averages, resolve_tasks_dir

SAMPLES = resolve_tasks_dir("samples")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    # Room for five examples in characters, and for the 256 that lm-eval lets TriviaQA write.
    model = tiny_llama()
    model.config.max_position_embeddings = 2048
    return model


@pytest.fixture(scope="module")
def results(model, tokenizer):
    return TaskSuite(tuple(TASKS), folder=SAMPLES).run(model, tokenizer, limit=4, batch_size=4)


def test_all_formats(results):
    assert list(results) == list(TASKS)
    for name, entry in results.items():
        assert entry["metric"] in entry and f"{entry['metric']}_stderr" in entry
        assert 0 <= entry[entry["metric"]] <= 1
        assert entry["questions"] == (8 if name == "mmlu" else 4)
        assert entry["shots"] == (5 if name in ("mmlu", "triviaqa") else 0)
        json.dumps(entry, allow_nan=False)
    for name in ZERO_SHOT:
        assert ("acc_norm" in results[name]) == (name != "winogrande")
        assert ("acc_answer" in results[name]) == (name in ("boolq", "openbookqa"))
    subjects = results["mmlu"]["subjects"]
    assert set(subjects) == {"elementary_mathematics", "anatomy"}
    assert results["mmlu"]["acc"] == sum(subjects.values()) / 2
    assert set(results["triviaqa"]) >= {"exact_match", "exact_match_stderr"}


def test_averages(results):
    found = averages(results)
    headline = {
        **dict.fromkeys(ZERO_SHOT, "acc_norm"),
        "winogrande": "acc",
        "boolq": "acc_answer",
        "openbookqa": "acc_answer",
    }
    assert found["average"] == sum(results[n][m] for n, m in headline.items()) / 8
    assert found["average_acc"] == sum(results[n]["acc"] for n in ZERO_SHOT) / 8
    assert found["average_of"] == 8
    assert averages({"piqa": results["piqa"]})["average_of"] == 1
    assert averages({"mmlu": results["mmlu"]})["average"] is None


def test_quantized_models_agree(tokenizer):
    """Scores and written answers of a packed model are those of the prepared one."""
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    suite = TaskSuite(["arc_easy", "triviaqa"], folder=SAMPLES, shots=0)
    written = suite._loaded[1].tasks["tasks"]["triviaqa"]
    written.set_config("generation_kwargs", {"max_gen_toks": 8}, update=True)
    found = []
    with qk.use_backend("reference"):
        for make in (lambda m: prepare(m, config).eval(), lambda m: convert(m, config)):
            suite.run(make(tiny_llama()), tokenizer, limit=2, batch_size=2)
            tasks = [each for part in suite._loaded for each in part.tasks["tasks"].values()]
            found.append([each.resps for task in tasks for each in task.instances])
    assert found[0] == found[1]


def test_shots_and_prompts(model, tokenizer):
    suite = TaskSuite(["triviaqa"], folder=SAMPLES, shots=2)
    suite.run(model, tokenizer, limit=1)
    prompt = suite._loaded[0].tasks["tasks"]["triviaqa"].instances[0].arguments[0]
    assert prompt.count("Question:") == 3 and prompt.endswith("\nAnswer:")


def test_results_that_are_kept(model, tokenizer):
    suite = TaskSuite(["piqa", "boolq"], folder=SAMPLES)
    seen = []
    first = suite.run(model, tokenizer, limit=2, keep=lambda tasks: seen.append(list(tasks)))
    assert seen == [["piqa"], ["piqa", "boolq"]]
    marked = {"piqa": {**first["piqa"], "acc": 7.0}, "boolq": {**first["boolq"], "shots": 3}}
    second = suite.run(model, tokenizer, limit=2, done=marked)
    assert second["piqa"]["acc"] == 7.0
    assert second["boolq"]["acc"] == first["boolq"]["acc"] and second["boolq"]["shots"] == 0


def test_the_cache_of_the_hub(tmp_path, monkeypatch, model, tokenizer):
    """A data set that the datasets library has prepared once is found without a network."""
    row = str(SAMPLES / "piqa.jsonl")
    datasets.load_dataset("json", data_files={"train": row, "validation": row}, cache_dir=tmp_path)
    made = next(tmp_path.glob("json/*/*/*/dataset_info.json")).parent
    cached = tmp_path / "baber___piqa" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, cached)
    for path in cached.glob("json-*"):
        path.rename(cached / path.name.replace("json-", "piqa-"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    cache = TaskSuite(["piqa"]).run(model, tokenizer, limit=3)["piqa"]
    local = TaskSuite(["piqa"], folder=SAMPLES).run(model, tokenizer, limit=3)["piqa"]
    for name in ("acc", "acc_norm", "questions"):
        assert cache[name] == local[name]
    assert cache["data_sha256"] is None


def test_a_data_set_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("arc_easy", "mmlu"):
        with pytest.raises(DataError, match=f"^{name}: its data set .*put {name}.jsonl") as caught:
            TaskSuite([name])
        assert "\n" not in str(caught.value)
    assert datasets.config.HF_HUB_OFFLINE is False  # as before


def test_refusals(tmp_path, monkeypatch):
    row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "juggling"}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="'juggling' is not a subject of MMLU"):
        TaskSuite(["mmlu"], folder=tmp_path, shots=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmqat\[eval\]'"):
        TaskSuite(["piqa"], folder=SAMPLES)
