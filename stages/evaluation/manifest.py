"""What the fetch stage wrote of lm-eval's tasks: artifacts/tasks/manifest.json, with the rows as Parquet beside it.

A benchmark is what is asked for by one name: a task, or a group of them whose scores lm-eval aggregates.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.errors import TextError
from stages.files import is_inner_path, read_json, write_json
from stages.plain_data import of_type

MANIFEST = "manifest.json"
OWN = "own"  # folder of the files of a user's own tasks, below artifacts/tasks


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a split.

    file: Parquet, below artifacts/tasks. rows: their number. sha256: of the file.
    """

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """A task of lm-eval that is no group.

    name: in lm-eval. definition: path of its YAML: below lm_eval/tasks, or below artifacts/tasks if it is one's own. own: whether it is.
    sha256: of the YAML; of one's own, of all files in the folder.
    overrides: keys that its group sets in it. data: split -> its rows, for the splits that are read.
    """

    name: str
    definition: str
    own: bool
    sha256: str
    overrides: dict[str, Any]
    data: dict[str, Data]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is reported under one name.

    subtasks: one, unless it is a group. is_group: whether lm-eval aggregates them. aggregated: metric -> whether rows weigh alike; else
    subtasks do. None of them for a single task.
    """

    name: str
    is_group: bool
    aggregated: dict[str, bool]
    subtasks: list[Subtask]


def write_manifest(directory: Path, benchmarks: dict[str, list[Benchmark]], sources: list[dict[str, Any]]) -> None:
    """Write the manifest.

    Args:
        benchmarks: asked name -> what is reported for it: several where the name is a tag of lm-eval. sources: the data sets, each with the
            commit, for the record.
    """
    asked = {name: [asdict(benchmark) for benchmark in of_name] for name, of_name in benchmarks.items()}
    write_json(directory / MANIFEST, {"benchmarks": asked, "sources": sources})


def read_manifest(directory: Path) -> dict[str, list[Benchmark]]:
    """Read what write_manifest wrote.

    Raises:
        SparsesweepError: the file is missing or not JSON. TextError: it has other keys, or names files elsewhere.
    """
    path = directory / MANIFEST
    data = read_json(path)
    try:
        benchmarks: dict[str, list[Benchmark]] = of_type(
            dict[str, list[Benchmark]], data.get("benchmarks") if isinstance(data, dict) else data, "benchmarks"
        )
        for benchmark in (benchmark for of_name in benchmarks.values() for benchmark in of_name):
            _require_inside(benchmark)
    except ValueError as error:
        raise TextError(
            f"{path}: found another form ({error}), wanted that of this version; run `python -m stages.fetch part=tasks`"
        ) from None
    return benchmarks


def _require_inside(benchmark: Benchmark) -> None:
    """Raise ValueError where a definition or a file of rows would be read from elsewhere: definitions may call functions beside them."""
    for subtask in benchmark.subtasks:
        for path in (subtask.definition, *(data.file for data in subtask.data.values())):
            if not is_inner_path(path):
                raise ValueError(f"{subtask.name}: found the path {path!r}, wanted one inside the folder of the tasks")
    if not benchmark.subtasks:
        raise ValueError(f"{benchmark.name}: found no subtasks, wanted at least one")
