"""What the experiments of this clone add to DVC's cache and to the remote, by the sizes that their locks state.

python -m benchmarks.disk

An output that several experiments name is counted once, at the first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from benchmarks import arguments
from stages.experiments.lock import read_lock
from stages.files import BASE, DENSE_RESULTS, RELEASE, SPARSE
from stages.sharing.references import of_clone

KINDS = {str(SPARSE): "delta", str(RELEASE): "release"}  # outputs that have a column of their own
RESULTS = f"{DENSE_RESULTS.parent}/"


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What an experiment adds [bytes]. base: the size of its base, whoever brought it."""

    name: str
    base: int
    delta: int
    results: int
    release: int
    others: int

    @property
    def total(self) -> int:
        return self.delta + self.results + self.release + self.others


def growth(locks: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Growth]:
    """What each experiment adds to those before it.

    Args:
        locks: name of the experiment, and the stages of its lock.
    """
    known: set[str] = set()
    rows = []
    for name, lock in locks:
        entries = {entry["path"]: entry for stage in lock.values() for entry in stage.get("outs", [])}
        added = dict.fromkeys(("delta", "results", "release", "others"), 0)
        for path, entry in entries.items():
            if entry["md5"] not in known:
                kind = "results" if path.startswith(RESULTS) else KINDS.get(path, "others")
                added[kind] += entry.get("size", 0)
        known |= {entry["md5"] for entry in entries.values()}
        rows.append(Growth(name=name, base=entries.get(str(BASE), {}).get("size", 0), **added))
    return rows


def main() -> None:
    rows = growth((one.name, read_lock(one.commit)) for one in of_clone())
    header = ["experiment", "delta", "results", "release", "others", "MB", "delta / base"]
    cells = [
        [row.name, *(size / 1e6 for size in (row.delta, row.results, row.release, row.others, row.total)), row.delta / max(row.base, 1)]
        for row in rows
    ]
    print(tabulate(cells, header, floatfmt=("", ".2f", ".2f", ".2f", ".2f", ".2f", ".3f")))
    print(f"{len(rows)} experiments add {sum(row.total for row in rows) / 1e6:.2f} MB")


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
