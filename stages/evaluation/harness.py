"""Zero-shot tasks by lm-eval's own API and stock task definitions, on the rows that the fetch stage wrote.

A task is a small YAML that includes the stock definition and replaces its data source.
"""

import logging
import os
from collections.abc import Hashable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stages.bos import Bos
from stages.checkpoint.tokens import require_requests
from stages.errors import ConfigError
from stages.evaluation.results import Samples
from stages.evaluation.tasks import TASKS, Task
from stages.files import write_lines
from stages.rows import Row

STOCK = Path(lm_eval.tasks.__file__).parent
FEW_SHOT = 0  # examples in the prompt
SEED = 0

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about the defaults that we override


class WholeModel(HFLM):
    """lm-eval's model, whose texts begin with BOS as decided, and whose progress bars obey TQDM_DISABLE, see stages/__init__.py."""

    def __init__(self, bos: Bos, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.bos, self._rolling = bos, False
        self.add_bos_token: bool | None = None  # the tokenizer's own way; tok_encode sees to the rest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **arguments: Any) -> list[int]:
        ids = super().tok_encode(string, add_special_tokens=add_special_tokens, **arguments)
        return ids if add_special_tokens is False or self._rolling else self.bos.begin(ids)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; lm-eval puts its prefix token, BOS, before each, so that the texts themselves must not begin with it."""
        added, self._rolling = self.add_bos_token, True
        self.add_bos_token = added if self.bos.token is None else False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token, self._rolling = added, False

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        require_requests(requests, self.model.get_input_embeddings().num_embeddings, self.tokenizer)
        return super()._loglikelihood_tokens(requests, *arguments, **options)


def stock_definition(task: Task) -> Path:
    """Find lm-eval's own YAML of a task without reading its other tasks.

    Raises:
        ConfigError: this version of lm-eval has no such task.
    """
    entry = TaskManager(include_defaults=False, include_path=str(STOCK / task.folder)).task_index.get(task.stock)
    if entry is None or entry.yaml_path is None:
        raise ConfigError(f"evaluation.tasks: lm-eval {version('lm-eval')} has no task {task.stock!r} in its folder {task.folder}")
    return entry.yaml_path


def write_task(task: Task, rows: list[Row], scratch: Path) -> str:
    """Write the rows, and the YAML that runs lm-eval's stock task on them.

    Returns:
        The name of the new task in lm-eval.
    """
    name, data = f"sparsesweep_{task.name}", scratch / f"{task.name}.jsonl"
    write_lines(data, rows)
    definition = {
        "include": str(stock_definition(task)),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(data.absolute())}, "cache_dir": str(scratch / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{task.split}_split": task.split,
    }
    (scratch / f"{name}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf8")
    return name


def zero_shot(model: LM, rows: dict[str, list[Row]], scratch: Path) -> Samples:
    """Score each task without examples in the prompt.

    Args:
        model: a WholeModel or a StreamedHarness.
        rows: task -> its rows, see tasks.read_task.
        scratch: a directory for rows, definitions and the cache of `datasets`.

    Returns:
        Task -> one entry per row, see results.Samples.

    Raises:
        ConfigError: lm-eval does not know the task.
    """
    if not rows:
        return {}
    names = {task: write_task(TASKS[task], rows[task], scratch) for task in rows}
    outcome = simple_evaluate(
        model=model,
        tasks=list(names.values()),
        task_manager=TaskManager(include_defaults=False, include_path=str(scratch)),
        num_fewshot=FEW_SHOT,
        bootstrap_iters=0,  # our standard errors come from the rows themselves
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    samples = {}
    for task, name in names.items():
        clusters = numbered(TASKS[task].documents(rows[task]))
        answers = sorted(outcome["samples"][name], key=lambda answer: answer["doc_id"])
        samples[task] = [
            {
                "row": answer["doc_id"],
                "cluster": clusters[answer["doc_id"]],
                "values": {metric: float(answer[metric]) for metric in TASKS[task].metrics},
                "target": str(answer["target"]),
                "scores": answer["filtered_resps"],
            }
            for answer in answers
        ]
    return samples


def numbered(documents: list[Hashable]) -> list[int]:
    """The number of each document among the different ones, by first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(document, len(numbers)) for document in documents]
