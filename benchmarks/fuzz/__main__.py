"""Feed every reader of what comes from outside with damaged and hostile inputs.

python -m benchmarks.fuzz                        100,000 inputs; writes benchmarks/fuzz.json and a table in SECURITY.md
python -m benchmarks.fuzz --reader deltas        the share of one reader anew
python -m benchmarks.fuzz --inputs 500 --seed 7  other inputs, fewer or more; writes nothing

Inputs are made from valid files by seeds, so a run has the same as the run before. Every reader has a process of its own, one after the
other. Prints the first input of each kind for which a property of guard.py does not hold, a table, and the number of inputs; fails where
there was such an input.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.fuzz import READERS
from benchmarks.fuzz.reader import Reader
from benchmarks.fuzz.tally import feed
from benchmarks.markers import write_between
from stages.files import read_json, write_json

FILE, DOCUMENT = Path("benchmarks/fuzz.json"), Path("SECURITY.md")
START, END = "<!-- fuzz: python -m benchmarks.fuzz -->", "<!-- end of fuzz -->"
INPUTS = 100_000
LIBRARIES = (
    "hypothesis",
    "safetensors",
    "gguf",
    "pyarrow",
    "transformers",
    "huggingface-hub",
    "lm-eval",
    "datasets",
    "PyYAML",
    "omegaconf",
    "zstandard",
)


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.result is not None:
        arguments.result.write_text(json.dumps(vars(feed(_named(arguments.reader), arguments.inputs, arguments.seed))))
        return
    chosen = READERS if arguments.reader is None else (_named(arguments.reader),)
    rows, kept = [], {row["reader"]: row for row in read_json(FILE)} if FILE.is_file() else {}
    for reader, inputs in zip(chosen, _numbers(chosen, arguments.inputs), strict=True):
        facts = {"reader": reader.name, "code": reader.code, "bound_mib": reader.memory}
        rows.append({**facts, **_in_a_process(reader, inputs, arguments.seed), **_measured_on()})
        print(f"{reader.name}: {rows[-1]['inputs']} inputs, {rows[-1]['faults']} faults", file=sys.stderr, flush=True)
        kept[reader.name] = rows[-1]
        if arguments.inputs is None and not rows[-1]["faults"]:
            write_json(FILE, [kept[each.name] for each in READERS if each.name in kept])
    print(table(rows))
    if faults := sum(row["faults"] for row in rows):
        sys.exit(f"found {faults} inputs for which a property does not hold")
    if arguments.inputs is None:
        write_between(DOCUMENT, START, END, table(read_json(FILE)))


def _numbers(chosen: Sequence[Reader], inputs: int | None) -> list[int]:
    """How many inputs each reader is fed with.

    Args:
        inputs: of all that are chosen; None: each has its share of INPUTS.
    """
    shares = sum(reader.share for reader in (READERS if inputs is None else chosen))
    return [math.ceil((INPUTS if inputs is None else inputs) * reader.share / shares) for reader in chosen]


def _measured_on() -> dict[str, Any]:
    return {"machine": _machine(), "versions": {library: version(library) for library in LIBRARIES}}


def _in_a_process(reader: Reader, inputs: int, seed: int) -> dict[str, Any]:
    """Feed a reader in a process of its own, which a fault of a library in C may end."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.fuzz", "--reader", reader.name, "--inputs", str(inputs)]
        done = subprocess.run([*command, "--seed", str(seed), "--result", str(result)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{reader.name}: an input ended the process with {done.returncode}")
        tally: dict[str, Any] = read_json(result)
        return tally


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a reader, the number of inputs, and what they were measured on."""
    lines = [
        "| reader | code below `stages/` | inputs | refused with a message | accepted | slowest | memory, at most | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row['inputs']:,} | {row['refused']:,} | {row['accepted']:,} | {row['slowest']:.2f} s | {row['peak'] / 2**20:.0f} MiB"
        lines.append(f"| {row['reader']} | `{row['code']}` | {numbers} | {row['bound_mib']} MiB |")
    total = sum(row["inputs"] for row in rows)
    machines = " and ".join(sorted({row["machine"] for row in rows}))
    numbers_of = {library: sorted({row["versions"][library] for row in rows}) for library in LIBRARIES}
    versions = ", ".join(f"{library} {' and '.join(numbers)}" for library, numbers in numbers_of.items())
    return "\n".join(lines) + f"\n\n{total:,} inputs in all. On {machines}; {versions}."


def _machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    return f"{names[0] if names else platform.machine()}, one thread, {system}"


def _named(name: str) -> Reader:
    found = next((reader for reader in READERS if reader.name == name), None)
    return found or sys.exit(f"found no reader {name!r}, wanted one of: {'; '.join(reader.name for reader in READERS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description="Feed readers with damaged and hostile inputs.")
    parser.add_argument("--inputs", type=int, metavar="N", help=f"in all; default: {INPUTS}, or of one reader its share of them")
    parser.add_argument("--reader", metavar="NAME", help="one alone; default: all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of one reader, for the process that started this one
    return parser


if __name__ == "__main__":
    main()
