"""Compare all experiments of this clone on one page: plots, tables and words, offline.

python -m stages.compare              writes comparison/index.html, and its numbers and plots as files
python -m stages.compare --out DIR    writes them there
"""

import argparse
import sys
from pathlib import Path

from stages.errors import SparsesweepError
from stages.experiments.page.group import read_groups
from stages.experiments.page.writing import keep_frontiers, write
from stages.experiments.reading import read_experiments
from stages.experiments.table import repeated
from stages.files import COMPARISON


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.compare", description="Compare all experiments of this clone on one page.")
    parser.add_argument("--out", type=Path, default=COMPARISON, metavar="DIR", help=f"where it is written, {COMPARISON} by default")
    directory = parser.parse_args().out
    try:
        print(write_page(directory))
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


def write_page(directory: Path) -> str:
    """Write the page of all experiments; returns what was written, in words.

    Raises:
        SparsesweepError: there is no evaluated experiment; names what was left out and why.
    """
    experiments, missing = read_experiments()
    groups, unread = read_groups(experiments)
    if not groups:
        reasons = "".join(f"\nleft out {one.name}: {one.reason}" for one in (*missing, *unread))
        raise SparsesweepError(f"found no evaluated experiment, wanted at least one; `dvc exp run` runs one{reasons}")
    write(directory, groups, [*missing, *unread, *repeated(experiments)])
    wrote = f"wrote {directory / 'index.html'}: {sum(len(group.results) for group in groups)} experiments"
    return f"{wrote}\nfor the picture of a card: -S publish.frontier={keep_frontiers(groups)}"


if __name__ == "__main__":
    main()
