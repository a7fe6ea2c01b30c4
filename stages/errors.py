"""What can go wrong, as a tree:

SparsesweepError
├── ConfigError       a value in params.yaml or on the command line
├── SourceError       something to be fetched: missing, unpinned, gated, corrupt, or not a decoder
├── CheckpointError   tensors on disk: truncated, not finite, or of another base
├── ArchitectureError a model whose blocks cannot be found, run alone or pruned
├── TextError         a row of a corpus or a benchmark that is not what it should be
├── CalibrationError  text that cannot give the windows asked for, or windows that are not those drawn
├── PruningError      a model, layer or statistic that cannot be pruned
├── ComparisonError   two results that are not of the same protocol, or one that cannot be read
└── ReleaseError      a release that is not what it should be
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SparsesweepError(Exception):
    """An error whose message is all that the user needs: the thing, what was found, what was wanted."""


class ConfigError(SparsesweepError):
    """A configuration value is wrong."""


class SourceError(SparsesweepError):
    """A source cannot be fetched."""


class CheckpointError(SparsesweepError):
    """Tensors on disk are not what they should be."""


class ArchitectureError(SparsesweepError):
    """A model's blocks cannot be found, run alone or pruned."""


class TextError(SparsesweepError):
    """A row of a corpus or a benchmark is not what it should be."""


class CalibrationError(SparsesweepError):
    """A corpus cannot give the windows asked for, or they are not those that were drawn."""


class PruningError(SparsesweepError):
    """A model, layer or statistic cannot be pruned."""

    @classmethod
    @contextmanager
    def naming(cls, place: str) -> Iterator[None]:
        """Say where it was that mathematics, which knows no names, found its arguments wrong (ValueError, ArithmeticError)."""
        try:
            yield
        except (ArithmeticError, ValueError) as error:
            raise cls(f"{place}: {error}") from error


class ComparisonError(SparsesweepError):
    """Two results cannot be compared."""


class ReleaseError(SparsesweepError):
    """A written release failed its checks."""
