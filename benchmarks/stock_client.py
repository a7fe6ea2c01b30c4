"""A release in the hands of someone without sparsesweep: stock transformers loads it, and lm-eval's own command scores it.

python -m benchmarks.stock_client [TASK ...]

Runs `lm_eval run --model hf` on release/, in float32, in a process in which the package stages cannot be imported: Python isolated from
the environment and the working directory (-I), without the links of editable installations (-S). The rows are those that the evaluation
of results/sparse scored; each metric must be that of results/sparse within 1e-4, and the largest difference of a continuation's
log-likelihood is in the table. Reads release/, results/sparse and artifacts/text as the stages left them, writes
benchmarks/stock_client.json and the table in docs/release.md. Takes minutes.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.markers import show_between
from stages.errors import ComparisonError
from stages.evaluation.questions import Source, embedded_source
from stages.evaluation.results import samples_file
from stages.evaluation.tasks import TASKS, read_task
from stages.files import RELEASE, SPARSE_RESULTS, TEXT, read_json, sha256, write_json

FILE, DOCUMENT = Path("benchmarks/stock_client.json"), Path("docs/release.md")
START, END = "<!-- stock client: python -m benchmarks.stock_client -->", "<!-- end of stock client -->"
DEFAULT = ("piqa", "arc_easy")
WITHIN = 1e-4
LIBRARIES = ("transformers", "lm_eval", "torch", "tokenizers", "safetensors")
ISOLATED = """
import sys
from importlib.util import find_spec
sys.path.append(sys.argv.pop(1))
if find_spec("stages") is not None:
    raise SystemExit("found the package stages, wanted a process that cannot import it")
"""
EVALUATE = """
from lm_eval.__main__ import cli_evaluate
sys.argv[0] = "lm_eval"
cli_evaluate()
"""


def isolated(code: str, *arguments: object) -> None:
    """Run code in a process of the same libraries that cannot import sparsesweep."""
    command = [sys.executable, "-I", "-S", "-c", ISOLATED + code, sysconfig.get_path("purelib"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"a stock client ended with {done.returncode}: {done.stdout[-3000:]}")


@dataclass(frozen=True, kw_only=True)
class StockScores:
    """What lm-eval's own command gives. metrics: name -> value. likelihoods: of the continuations of each row, nats."""

    metrics: dict[str, float]
    likelihoods: list[list[float]]


def scored(release: Path, sources: list[Source], scratch: Path) -> dict[str, StockScores]:
    """The scores of a release by lm-eval's own command, by task."""
    definitions, out = scratch / "definitions", scratch / "out"
    definitions.mkdir()
    names = {}
    for source in sources:
        for number, definition in enumerate(source.tasks.values()):
            names[name := f"stock_{source.name}_{number}"] = source.name
            settings = {"task": name, "num_fewshot": source.few_shot}
            (definitions / f"{name}.yaml").write_text(yaml.safe_dump({**definition, **settings}, sort_keys=False), encoding="utf8")
    model = ("--model", "hf", "--model_args", f"pretrained={release.absolute()},dtype=float32", "--device", "cpu", "--batch_size", 4)
    tasks = ("--tasks", ",".join(names), "--include_path", definitions.absolute())
    isolated(EVALUATE, "run", *model, *tasks, "--output_path", out.absolute(), "--log_samples")
    (results,) = out.rglob("results*.json")
    of_tasks = json.loads(results.read_text(encoding="utf8"))["results"]
    return {task: _of_task(of_tasks[name], *out.rglob(f"samples_{name}_*.jsonl")) for name, task in names.items()}


def _of_task(results: dict[str, Any], samples: Path) -> StockScores:
    """Args: samples: a JSON line a row, of which lm-eval writes every number as text."""
    metrics = {key.split(",")[0]: value for key, value in results.items() if ",none" in key}
    rows = sorted(rows_of(samples), key=lambda row: row["doc_id"])
    return StockScores(metrics=metrics, likelihoods=[[float(likelihood) for likelihood, _ in row["filtered_resps"]] for row in rows])


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def largest_difference(task: str, ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Of the log-likelihood of any continuation of any row, nats.

    Raises:
        ComparisonError: they are not of as many rows and continuations.
    """
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        raise ComparisonError(f"{task}: found {len(theirs)} rows by lm-eval's command, wanted {len(ours)} with as many continuations each")
    return max(abs(our - their) for row in zip(ours, theirs, strict=True) for our, their in zip(*row, strict=True))


def of_task(task: str, ours: list[dict[str, Any]], theirs: StockScores) -> list[dict[str, Any]]:
    """The rows of the table for a task: one for each metric that both have.

    Args:
        ours: rows as evaluate wrote them, see results.samples_file.

    Raises:
        ComparisonError: see compared and largest_difference.
    """
    likelihoods = [[likelihood for likelihood, _ in row["scores"]] for row in ours]
    apart = largest_difference(task, likelihoods, theirs.likelihoods)
    means = {metric: sum(row["values"][metric] for row in ours) / len(ours) for metric in ours[0]["values"] if metric in theirs.metrics}
    return [compared(task, metric, mean, theirs.metrics[metric]) | {"apart": apart} for metric, mean in means.items()]


def compared(task: str, metric: str, ours: float, theirs: float) -> dict[str, Any]:
    """A row of the table.

    Raises:
        ComparisonError: the scores differ; names the task and both.
    """
    if abs(ours - theirs) > WITHIN:
        raise ComparisonError(f"{task}, {metric}: found {theirs} by lm-eval's command, wanted {ours} as in {SPARSE_RESULTS}")
    return {"task": task, "metric": metric, "ours": ours, "stock": theirs}


def in_words(versions: dict[str, str]) -> str:
    """Library -> version, as a list in a sentence."""
    return ", ".join(f"{library} {value}" for library, value in versions.items())


def table(facts: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| task | rows | metric | ours | stock client | largest difference of a log-likelihood |", "|---" * 6 + "|"]
    for row in facts["scores"]:
        lines.append(f"| {row['task']} | {facts['rows']} | {row['metric']} | {row['ours']:.6f} | {row['stock']:.6f} | {row['apart']:.1e} |")
    return "\n".join([*lines, "", f"{facts['model']}, in float32 on a CPU, with {in_words(facts['versions'])}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Score release/ by lm-eval's own command, without sparsesweep.")
    parser.add_argument("tasks", nargs="*", default=DEFAULT)
    names = parser.parse_args().tasks
    protocol = read_json(SPARSE_RESULTS / "details/protocol.json")
    rows = protocol["evaluation"]["rows"]
    with tempfile.TemporaryDirectory() as directory:
        scratch, sources = Path(directory), []
        for name in names:
            path = TEXT / f"evaluation/{name}.jsonl"
            asked = read_task(TASKS[name], path, rows)
            sources.append(embedded_source(TASKS[name], asked, [], few_shot=0, sha256=sha256(path), scratch=scratch))
        theirs = scored(RELEASE, sources, scratch)
    scores = [row for name in names for row in of_task(name, rows_of(samples_file(SPARSE_RESULTS / "details", name)), theirs[name])]
    versions = {library: version(library) for library in LIBRARIES}
    facts = {"model": read_json(RELEASE / "provenance.json")["base"]["name"], "rows": rows, "scores": scores, "versions": versions}
    write_json(FILE, facts)
    show_between(DOCUMENT, START, END, table(facts))


if __name__ == "__main__":
    main()
