"""The LLaMA paper's normalization as an lm-eval task (imports lm-eval)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from llmqat.eval.tasks.catalog import ACC_ANSWER

ANSWER_CONTEXT = "Answer:"


class AnswerNormalizedTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is untyped
    """A multiple-choice task with one more metric, `acc_answer`: the choice with the highest
    P(choice | question) / P(choice | "Answer:").

    Touvron et al. 2023, section 3, after Brown et al. 2020: for OpenBookQA and BoolQ, whose choices
    differ much in how likely they are before any question is read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(
        self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any
    ) -> list[Instance]:
        """One request for every choice after the question, then one for each after "Answer:"."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        unconditional = [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(ANSWER_CONTEXT, request.arguments[1]),
                idx=len(requests) + request.idx,
                metadata=kwargs["metadata"],
            )
            for request in requests
        ]
        return [*requests, *unconditional]

    def process_results(
        self, doc: dict[str, Any], results: list[tuple[float, bool]]
    ) -> dict[str, Any]:
        """lm-eval's metrics of the first half, and `acc_answer`."""
        half = len(results) // 2
        conditional = [score for score, _ in results[:half]]
        unconditional = [score for score, _ in results[half:]]
        best = int(np.argmax(np.subtract(conditional, unconditional)))
        right = best == self.doc_to_target(doc)
        return {**super().process_results(doc, results[:half]), ACC_ANSWER: float(right)}

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """How a metric's values become one."""
        return {**super().aggregation(), ACC_ANSWER: mean}

    def higher_is_better(self) -> dict[str, bool]:
        """The direction of every metric."""
        return {**super().higher_is_better(), ACC_ANSWER: True}
