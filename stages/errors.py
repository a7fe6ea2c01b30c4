"""The exception tree:

SparsesweepError
├── ConfigError       a wrong value in params.yaml or on the command line
├── SourceError       a source that is missing, unpinned, gated, corrupt, or not a decoder
├── CheckpointError   tensors on disk that are truncated, not finite, or of another base
├── ArchitectureError a model whose blocks cannot be found, run alone or pruned
├── TextError         a row of a corpus or a benchmark that has the wrong form
├── CalibrationError  text that is too short for the windows, or windows that are not those that were drawn
├── PruningError      a model, layer or statistic that cannot be pruned
├── ComparisonError   two results with different protocols, or a result that cannot be read
├── ReleaseError      a release that failed its checks
└── SharingError      experiments that cannot be shared or received
"""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 10_000  # characters: a message quotes names and values of files, which may be of any length


class SparsesweepError(Exception):
    """An error whose message is complete for the user: it names the thing, the value found and the value wanted.

    model: of several that run side by side, the one that it is of; None: of none of them alone.
    """

    model: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…")


@contextmanager
def of_model(name: str) -> Iterator[None]:
    """Say of errors which of several models that run side by side they are of."""
    try:
        yield
    except SparsesweepError as error:
        error.model = name
        raise


class ConfigError(SparsesweepError):
    """A configuration value is wrong."""


class SourceError(SparsesweepError):
    """A source cannot be fetched."""


class CheckpointError(SparsesweepError):
    """Tensors on disk are truncated, not finite, or of another base."""


class ArchitectureError(SparsesweepError):
    """A model's blocks cannot be found, run alone or pruned."""


class TextError(SparsesweepError):
    """A row of a corpus or a benchmark has the wrong form."""


class CalibrationError(SparsesweepError):
    """A corpus is too short for the windows, or the windows are not those that were drawn."""


class PruningError(SparsesweepError):
    """A model, layer or statistic cannot be pruned."""

    @classmethod
    @contextmanager
    def naming(cls, subject: str) -> Iterator[None]:
        """Turn a ValueError or ArithmeticError of a numerical function into an error that names the layer or block, `subject`."""
        try:
            yield
        except (ArithmeticError, ValueError) as error:
            raise cls(f"{subject}: {error}") from error


class ComparisonError(SparsesweepError):
    """Two results cannot be compared."""


class ReleaseError(SparsesweepError):
    """A written release failed its checks."""


class SharingError(SparsesweepError):
    """Experiments cannot be shared or received."""


class NotReceivedError(SharingError):
    """Some experiments were not received, or not whole, and all others were. names: theirs."""

    def __init__(self, names: list[str], message: str) -> None:
        super().__init__(message)
        self.names = names
