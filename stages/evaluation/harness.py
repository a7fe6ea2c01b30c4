"""Zero-shot tasks through lm-eval's own API: its stock task definitions, on the rows that fetch brought.

A task is a small YAML that includes the stock one and replaces its data source.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stages.errors import ConfigError
from stages.evaluation.perplexity import standard_error

# Our name of a task -> lm-eval's name and the split that it scores.
STOCK = {
    "boolq": ("boolq", "validation"),
    "rte": ("rte", "validation"),
    "hellaswag": ("hellaswag", "validation"),
    "winogrande": ("winogrande", "validation"),
    "arc_easy": ("arc_easy", "test"),
    "arc_challenge": ("arc_challenge", "test"),
    "openbookqa": ("openbookqa", "test"),
    "lambada": ("lambada_openai", "test"),
    "piqa": ("piqa", "validation"),
}
SEED = 0


class WholeModel(HFLM):
    """lm-eval's model, whose progress bars are for a terminal only."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())


def write_task(task: str, rows: Path, directory: Path, scratch: Path, stock_yaml: Path) -> str:
    """Write the YAML that runs lm-eval's stock task on our rows.

    Returns:
        The name that lm-eval knows it by.
    """
    _, split = STOCK[task]
    name = f"sparsesweep_{task}"
    definition = {
        "include": str(stock_yaml),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows.absolute())}, "cache_dir": str(scratch)},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{split}_split": split,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    return name


def zero_shot(
    model: LM, tasks: list[str], *, rows_in: Path, limit: int | None, scratch: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Accuracy of each task, no examples in the prompt.

    Args:
        model: a WholeModel, or one that is streamed.
        rows_in: directory of TASK.jsonl.
        limit: the first rows of each task; None for all.
        scratch: an empty directory for task definitions and caches.

    Returns:
        task -> {"accuracy", "stderr", "rows", and "accuracy_norm" where the task has it}, all finite;
        task -> one entry a row: its number, the gold answer and what the model scored.

    Raises:
        ConfigError: lm-eval does not know the task.
    """
    if not tasks:
        return {}, {}
    definitions = scratch / "tasks"
    definitions.mkdir()
    stock = TaskManager().task_index
    for task in tasks:
        if STOCK[task][0] not in stock:
            raise ConfigError(f"evaluation.tasks: lm-eval has no task {STOCK[task][0]!r}")
    names = {
        write_task(task, rows_in / f"{task}.jsonl", definitions, scratch / "rows", Path(stock[STOCK[task][0]].yaml_path)): task
        for task in tasks
    }
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about the defaults that we override
    outcome = simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(definitions)),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,  # our standard errors come from the rows themselves
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    scores, samples = {}, {}
    for name, task in names.items():
        found = outcome["results"][name]
        correct = [sample["acc"] for sample in outcome["samples"][name]]
        scores[task] = {"accuracy": found["acc,none"], "stderr": standard_error(correct), "rows": len(correct)}
        if "acc_norm,none" in found:
            scores[task]["accuracy_norm"] = found["acc_norm,none"]
        samples[task] = [
            {"row": sample["doc_id"], "target": str(sample["target"]), "correct": sample["acc"], "scores": sample["filtered_resps"]}
            for sample in outcome["samples"][name]
        ]
    return scores, samples
