"""Feed a reader with inputs and count how they ended."""

import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz.guard import Fault, Guard, Outcome, prepared
from benchmarks.fuzz.mutations import Files
from benchmarks.fuzz.reader import Reader

AT_ONCE = 1000  # inputs of one seed: hypothesis remembers them all
MEMORY = Path("/dev/shm")  # a file system that writes to no disk
SETTINGS = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
SHOWN = 1000  # characters of an input that is printed


@dataclass(kw_only=True)
class Tally:
    """How the inputs of a reader ended.

    slowest: seconds of the slowest. peak: bytes by which memory grew at most. faults: inputs for which a property does not hold.
    """

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    peak: int = 0
    faults: int = 0

    def add(self, outcome: Outcome) -> None:
        self.refused += outcome.message is not None
        self.accepted += outcome.message is None
        self.slowest, self.peak = max(self.slowest, outcome.seconds), max(self.peak, outcome.peak)


def feed(reader: Reader, inputs: int, first_seed: int) -> Tally:
    """Feed a reader; the first input of each kind of fault is printed to stderr."""
    tally, kinds = Tally(), set[str]()
    with guarded(reader) as guard:
        for number in range(inputs):  # hypothesis makes fewer where it finds no more
            if tally.inputs >= inputs:
                break
            count = min(AT_ONCE, inputs - tally.inputs)
            phases = settings(max_examples=count, phases=[Phase.generate], parent=SETTINGS)
            seed(first_seed + number)(phases(given(reader.inputs)(watching(reader, guard, tally, kinds, f"seed {first_seed + number}"))))()
    return tally


@contextmanager
def guarded(reader: Reader) -> Iterator[Guard]:
    """Yield a guard for the cases of a reader, within what they run in."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory,
        prepared(Path(directory)) as guard,
        reader.around(),
    ):
        yield guard


def watching(reader: Reader, guard: Guard, tally: Tally, kinds: set[str], origin: str) -> Callable[[Files], None]:
    """A function that feeds one case to a reader and counts how it ended.

    Args:
        kinds: of faults that were printed; added to. origin: what to say of where an input comes from.
    """

    def case(files: Files) -> None:
        tally.inputs += 1
        try:
            tally.add(guard.run(files, lambda: reader.read(files), names=reader.names, memory=reader.memory * 2**20))
        except Fault as fault:
            tally.faults += 1
            kind = re.sub(r"\d+", "N", str(fault))[:70]
            if kind not in kinds:
                kinds.add(kind)
                print(f"{reader.name}, {origin}: {fault}\n{repr(files)[:SHOWN]}", file=sys.stderr)
                traceback.print_exception(fault.__cause__, limit=-4)

    return case
