"""The paper's question sets, scored by lm-eval (LLM-QAT section 3.2 and table 6).

`catalog` names the tasks and what their rows hold, `local` reads rows from files, `scoring` is the
normalization of the LLaMA paper, `suite` puts a model before them. `samples/` holds ten invented
questions per format: they show the formats and let everything run offline, and measure nothing.
"""

from llmqat.eval.tasks.catalog import GROUPS, TASKS, ZERO_SHOT, task_names
from llmqat.eval.tasks.local import SAMPLES, resolve_tasks_dir
from llmqat.eval.tasks.suite import TaskSuite, averages

__all__ = [
    "GROUPS",
    "SAMPLES",
    "TASKS",
    "ZERO_SHOT",
    "TaskSuite",
    "averages",
    "resolve_tasks_dir",
    "task_names",
]
