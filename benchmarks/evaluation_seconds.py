"""Seconds that the evaluations of conf/ take of the dense embedded model.

python -m benchmarks.evaluation_seconds            a quarter of an hour on two cores
python -m benchmarks.evaluation_seconds --table    measure nothing, write the table

`smoke`, `sweep`, `perplexity` and `quick` are run whole, in one process. `full` and `paper` take hours: a window of 2048 tokens and a row
of each task are timed as the difference of two short runs, and multiplied. Rows are the first of each task, and later ones may be
longer. Reads artifacts/base and artifacts/text (`dvc exp run -S evaluation=full fetch_base fetch_text`), works in a directory of its
own, writes benchmarks/evaluation_seconds.json and the table in docs/methods.md.
"""

import argparse
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

from benchmarks.markers import show_between
from stages import evaluate
from stages.checkpoint.reader import PROVENANCE
from stages.config.compose import read
from stages.files import BASE, DENSE_RESULTS, TEXT, read_json, write_json

FILE, DOCUMENT = Path("benchmarks/evaluation_seconds.json"), Path("docs/methods.md")
START, END = "<!-- evaluation seconds: python -m benchmarks.evaluation_seconds -->", "<!-- end of evaluation seconds -->"
WHOLE, PROJECTED = ("smoke", "sweep", "perplexity", "quick"), ("full", "paper")
CORPUS = "wikipedia"
WINDOWS, ROWS = (2, 6), (8, 72)  # of the two short runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        write_json(FILE, measured())
    show_between(DOCUMENT, START, END, table(read_json(FILE)))


def measured() -> dict[str, Any]:
    """Seconds of what is run whole, of a window and of a row of each task, and how many of these there are.

    Raises:
        SystemExit: the workspace lacks the text of `full`.
    """
    for path in (BASE, TEXT / "evaluation/wikipedia_long.jsonl"):
        if not path.exists():
            raise SystemExit(f"{path}: found nothing, wanted it; run dvc exp run -S evaluation=full fetch_base fetch_text first")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        Path("artifacts").mkdir()
        for path in (BASE, TEXT):
            path.symlink_to(here / path)
        whole = {name: run(f"evaluation={name}")["seconds"] for name in WHOLE}
        few, more = (run(*short(windows=windows)) for windows in WINDOWS)
        window = slope(few, more, WINDOWS)
        tasks = {name: of_task(name) for name in read("evaluation=full")["evaluation"].tasks}
        facts = {"model": read_json(BASE / PROVENANCE)["name"], "device": few["device"], "dtype": few["dtype"], "code": few["code"]}
    available = few["protocol"]["corpora"][CORPUS]["available"]
    return {**facts, "whole": whole, "window": window, "windows": available, "tasks": tasks}


def run(*overrides: str) -> dict[str, Any]:
    """Evaluate the dense model, and read the record of the run and its protocol."""
    evaluate.main.function(part="dense", evaluation=read(*overrides)["evaluation"])
    record = read_json(DENSE_RESULTS / "run.json")
    print(*overrides, f"{record['seconds']:.1f} s", flush=True)
    return {**record, "protocol": read_json(DENSE_RESULTS / "details/protocol.json")}


def short(*, windows: int, tasks: str = "", rows: int = ROWS[0]) -> list[str]:
    """The overrides of a short run of `full`."""
    corpora = [f"evaluation.corpora.{CORPUS}.windows={windows}", "~evaluation.corpora.wikipedia_long"]
    return ["evaluation=full", f"evaluation.tasks=[{tasks}]", f"evaluation.rows={rows}", *corpora, "evaluation.generations.prompts=[]"]


def of_task(name: str) -> dict[str, Any]:
    """Seconds of a row, and the number of rows that there are."""
    few, more = (run(*short(windows=WINDOWS[0], tasks=name, rows=rows)) for rows in ROWS)
    return {"row": slope(few, more, ROWS), "rows": few["protocol"]["tasks"][name]["available"]}


def slope(few: dict[str, Any], more: dict[str, Any], counts: tuple[int, int]) -> float:
    """Seconds of one more, by two runs of so many."""
    return (more["seconds"] - few["seconds"]) / (counts[1] - counts[0])


def projected(facts: dict[str, Any], name: str) -> tuple[float, float]:
    """Seconds of all windows that are here and of all rows of the tasks that an option asks."""
    evaluation = read(f"evaluation={name}")["evaluation"]
    counts = [facts["windows"] if windows.windows is None else windows.windows for windows in evaluation.corpora.values()]
    tasks = [facts["tasks"][task] for task in evaluation.tasks]
    return facts["window"] * sum(counts) * (CORPUS in evaluation.corpora), sum(one["row"] * one["rows"] for one in tasks)


def table(facts: dict[str, Any]) -> str:
    """Markdown: a row for each option, and what was measured."""
    lines = ["| evaluation | dense model | how it is known |", "|---|---|---|"]
    lines += [f"| `{name}` | {seconds:.0f} s | run whole |" for name, seconds in facts["whole"].items()]
    for name in PROJECTED:
        windows, rows = projected(facts, name)
        said = (f"{windows / 60:.0f} minutes of windows, " if windows else "") + f"{rows / 3600:.1f} hours of tasks"
        more = "" if windows else f"; its windows, of another text, {facts['window']:.1f} s each"
        lines.append(f"| `{name}` | {said} | projected from the first windows and rows{more} |")
    tasks = ", ".join(f"{name} {task['row']:.2f} × {task['rows']:,}" for name, task in facts["tasks"].items())
    return "\n".join(lines) + (
        f"\n\n{facts['model']} in {facts['dtype']} on {facts['device']}, commit {facts['code'][:7]}, without the start of the process. "
        f"Seconds of a row, and rows: {tasks}."
    )


if __name__ == "__main__":
    main()
