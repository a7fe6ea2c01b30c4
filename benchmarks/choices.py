"""The tables of docs/choices.md: every entry of every table of the code, with its summary, its source and its parameters.

python -m benchmarks.choices
"""

from dataclasses import fields, is_dataclass
from pathlib import Path

from benchmarks import arguments
from benchmarks.markers import write_between
from stages.calibration.samplers import SAMPLERS
from stages.evaluation.tasks import TASKS
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.patterns import PATTERNS
from stages.pruning.reconstructions import RECONSTRUCTIONS
from stages.pruning.scores import SCORES
from stages.pruning.updates import UPDATES
from stages.schema import CHECK, Entry, Table
from stages.sources.base import BASES
from stages.sources.readers import READERS
from stages.sources.text import TEXTS

DOCUMENT = Path("docs/choices.md")
TABLES: dict[str, Table] = {
    "scores": SCORES,
    "updates": UPDATES,
    "patterns": PATTERNS,
    "allocations": ALLOCATIONS,
    "reconstructions": RECONSTRUCTIONS,
    "samplers": SAMPLERS,
    "tasks": TASKS,
    "bases": BASES,
    "texts": TEXTS,
    "readers": READERS,
}


def main() -> None:
    for name, table in TABLES.items():
        write_between(DOCUMENT, *markers(name), markdown(table))
        print(f"{name}: {len(table)}")


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python -m benchmarks.choices -->", f"<!-- end of {name} -->"


def markdown(table: Table) -> str:
    """One line an entry."""
    lines = ["| name | what it is | parameters |", "|---|---|---|"]
    lines += [f"| `{name}` | {escaped(entry.reference)} | {parameters(table, entry)} |" for name, entry in table.items()]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """With the bars of absolute values and norms, which would end a cell."""
    return text.replace("|", "\\|")


def parameters(table: Table, entry: Entry) -> str:
    """Each with its range, where it has one."""
    shown = []
    for field in fields(entry.parameters) if is_dataclass(entry.parameters) else ():
        if field.name != table.key:
            condition = field.metadata.get(CHECK)
            shown.append(f"`{field.name}`" + (f": {condition.wanted}" if condition else ""))
    return "; ".join(shown)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
