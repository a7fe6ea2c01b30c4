"""The scores of a model, and the files in which the evaluation writes them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import ComparisonError, SparsesweepError
from stages.evaluation.perplexity import WindowLosses
from stages.evaluation.protocol import Protocol
from stages.files import read_json, write_json, write_lines
from stages.rows import Rows

Scores = dict[str, dict[str, float]]
Samples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The scores of one model.

    scores: task -> scores, see harness.zero_shot. samples: task -> one entry for each of its rows.
    generations: one row per prompt, see generation.generate.
    """

    losses: WindowLosses
    scores: Scores
    samples: Samples
    generations: list[dict[str, str]]

    def metrics(self) -> dict[str, float]:
        """All scores as flat metrics; the standard error of the mean assumes that the tasks are independent."""
        flat = {"perplexity": self.losses.perplexity, "perplexity_stderr": self.losses.stderr}
        for task, score in self.scores.items():
            flat |= {task: score["accuracy"], f"{task}_stderr": score["stderr"]}
        if self.scores:
            flat["accuracy_mean"] = sum(score["accuracy"] for score in self.scores.values()) / len(self.scores)
            flat["accuracy_mean_stderr"] = sum(score["stderr"] ** 2 for score in self.scores.values()) ** 0.5 / len(self.scores)
        return flat

    def accuracy(self, model: str) -> list[dict[str, Any]]:
        """One row per task, with the same keys in each row: DVC plots only such rows."""
        keys = ("accuracy", "stderr", "rows")
        return [{"model": model, "task": task, **{key: score[key] for key in keys}} for task, score in self.scores.items()]

    def write(self, details: Path) -> None:
        write_json(details / "scores.json", self.scores)
        write_json(details / "windows.json", self.losses.losses)
        write_json(details / "generations.json", self.generations)
        for task, rows in self.samples.items():
            write_lines(samples_file(details, task), rows)


def read_results(details: Path, protocol: Protocol) -> Results:
    """Read the results that `Results.write` wrote; of the samples, those columns that are compared.

    Raises:
        ComparisonError: a file is missing or does not fit the protocol; names it.
    """
    losses, scores, generations = (_read(details / f"{name}.json") for name in ("windows", "scores", "generations"))
    _require(_are_losses(losses, protocol.windows), details / "windows.json", f"{protocol.windows} finite losses")
    _require(_are_scores(scores, list(protocol.tasks)), details / "scores.json", f"the scores of {', '.join(protocol.tasks) or 'no task'}")
    _require(_are_generations(generations, protocol.prompts), details / "generations.json", f"a row for each of {protocol.prompts}")
    samples = {}
    for name, task in protocol.tasks.items():
        path = samples_file(details, name)
        samples[name] = _read_lines(path)
        _require(_are_samples(samples[name], task.rows), path, f"{task.rows} rows in order, each with 0 or 1 as correct")
    return Results(losses=WindowLosses(losses=losses), scores=scores, samples=samples, generations=generations)


def samples_file(details: Path, task: str) -> Path:
    """The path of the samples of a task."""
    return details / f"samples-{task}.jsonl"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ComparisonError(f"{path}: not found")
    try:
        rows = Rows(path)
        return [{"row": row.get("row"), "correct": row.get("correct")} for row in rows]
    except SparsesweepError as error:
        raise ComparisonError(str(error)) from None


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except SparsesweepError as error:
        raise ComparisonError(str(error)) from None


def _require(valid: bool, path: Path, expected: str) -> None:
    if not valid:
        raise ComparisonError(f"{path}: wanted {expected}, as protocol.json says; was it changed by hand?")


def _are_losses(data: Any, count: int) -> bool:
    return isinstance(data, list) and len(data) == count and all(isinstance(loss, float) and math.isfinite(loss) for loss in data)


def _are_scores(data: Any, tasks: list[str]) -> bool:
    keys = {"accuracy", "stderr", "rows"}
    return isinstance(data, dict) and list(data) == tasks and all(isinstance(score, dict) and keys <= set(score) for score in data.values())


def _are_samples(rows: list[dict[str, Any]], count: int) -> bool:
    return [row["row"] for row in rows] == list(range(count)) and all(row["correct"] in (0, 1) for row in rows)


def _are_generations(data: Any, prompts: list[str]) -> bool:
    rows = data if isinstance(data, list) and all(isinstance(row, dict) and "raw" in row for row in data) else [{}]
    return [row.get("prompt") for row in rows] == prompts
