"""Bounds on what is held in memory: a small compressed file may hold gigabytes, and nobody notices before the memory is full."""

from io import BufferedIOBase
from typing import IO

from stages.errors import SourceError

LARGEST = 2**30  # bytes that are held as a whole: a text, a JSON array, a file inside a wheel
LONGEST_LINE = 2**27  # bytes of a line, or of a row of CSV
PIECE = 2**20  # bytes that are read at once


def read_whole(stream: IO[bytes] | BufferedIOBase, subject: str, most: int | None = None) -> bytes:
    """Read a stream to its end.

    Args:
        subject: what it is, for the error. most: bytes that it may have; None: LARGEST.

    Raises:
        SourceError: it has more; names it and the bound.
    """
    most = LARGEST if most is None else most
    data = bytearray()
    while piece := stream.read(PIECE):
        data += piece
        if len(data) > most:
            raise too_large(subject, most)
    return bytes(data)


def copy_whole(stream: IO[bytes], target: IO[bytes], subject: str, most: int) -> None:
    """Write what a stream has to another, a piece at a time; see read_whole."""
    copied = 0
    while piece := stream.read(PIECE):
        copied += len(piece)
        if copied > most:
            raise too_large(subject, most)
        target.write(piece)


def too_large(subject: str, most: int) -> SourceError:
    """The error on what has more than `most` bytes."""
    return SourceError(f"{subject}: found more than {most:,} bytes, wanted at most that")
