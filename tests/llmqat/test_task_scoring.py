"""The LLaMA paper's normalization against likelihoods computed by hand."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

pytest.importorskip("lm_eval")

from llmqat.eval.tasks import TaskSuite, resolve_tasks_dir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=4)


def _log_likelihood(model, tokenizer, context, choice):
    """log P(choice | context) in fp64."""
    start, ids = tokenizer(context)["input_ids"], tokenizer(choice)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + ids[:-1]])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(start) - 1 :]
    return math.fsum(float(row[each]) for row, each in zip(rows, ids, strict=True))


def _boolq(row):
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return prompt, ["no", "yes"], row["label"]


def _openbookqa(row):
    choices = row["choices"]
    return row["question_stem"], choices["text"], choices["label"].index(row["answerKey"])


@pytest.mark.parametrize(("name", "read"), [("boolq", _boolq), ("openbookqa", _openbookqa)])
def test_by_hand(model, tokenizer, name, read):
    suite = TaskSuite([name], folder=resolve_tasks_dir("samples"))
    result = suite.run(model, tokenizer, batch_size=4)[name]
    task = suite._loaded[0].tasks["tasks"][name]
    right = {"acc": 0, "acc_norm": 0, "acc_answer": 0}
    differ = 0
    for index, row in enumerate(task.test_docs()):
        prompt, choices, gold = read(row)
        plain = [_log_likelihood(model, tokenizer, prompt, f" {c}") for c in choices]
        alone = [_log_likelihood(model, tokenizer, "Answer:", f" {c}") for c in choices]
        scores = {
            "acc": plain,
            "acc_norm": [score / len(c) for score, c in zip(plain, choices, strict=True)],
            "acc_answer": [a - b for a, b in zip(plain, alone, strict=True)],
        }
        for metric, values in scores.items():
            right[metric] += values.index(max(values)) == gold
        best = {metric: values.index(max(values)) for metric, values in scores.items()}
        differ += best["acc"] != best["acc_answer"]
        asked = [each for each in task.instances if each.doc_id == index]
        found = [each.resps[0][0] for each in sorted(asked, key=lambda each: each.idx)]
        assert found == pytest.approx([*plain, *alone], rel=1e-4)
    assert {metric: result[metric] for metric in right} == {m: n / 10 for m, n in right.items()}
    assert result["metric"] == "acc_answer" and result["questions"] == 10
    # With these answers one is likelier always: test_the_ratio_decides covers that format.
    assert differ or name == "boolq"


def test_the_ratio_decides():
    suite = TaskSuite(["boolq"], folder=resolve_tasks_dir("samples"))
    task = suite._loaded[0].tasks["tasks"]["boolq"]
    doc = {"passage": "p", "question": "q", "label": 1}
    # "no" is likelier after the question, but still likelier after "Answer:".
    results = [(-1.0, False), (-2.0, False), (-0.5, False), (-4.0, False)]
    metrics = task.process_results(doc, results)
    assert (metrics["acc"], metrics["acc_answer"]) == (0.0, 1.0)
    assert task.higher_is_better()["acc_answer"]
    assert task.aggregation()["acc_answer"]([1.0, 0.0]) == 0.5
