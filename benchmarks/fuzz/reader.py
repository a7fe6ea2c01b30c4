"""What is fuzzed: a reader, its inputs, and what it may cost."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.mutations import Files


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of what comes from outside.

    name: of what it reads. code: the modules that read it, for the table.
    inputs: strategy of the files of a case. read: reads them in the current directory, as a stage does; what it was given is its argument.
    names: one of them stands in the message of every refusal.
    memory: bound on the growth of resident memory in MiB, for the small inputs here. share: of all inputs, relative to the other readers.
    around: what every case of it runs within, such as a hub on loopback.
    """

    name: str
    code: str
    inputs: SearchStrategy[Files]
    read: Callable[[Files], object]
    names: tuple[str, ...]
    memory: int = 64
    share: float = 1.0
    around: Callable[[], AbstractContextManager[object]] = nullcontext
