"""The rows of a corpus or a benchmark: JSON Lines, read by number when asked for, and checked.

C4's first shard never lies in memory whole. Whatever is wrong with a row is said with its file and line.
"""

import json
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stages.errors import TextError

Row = dict[str, Any]
LONGEST = 60  # characters of a value shown in an error


class Rows:
    """The rows of a JSON Lines file by their number.

    Raises:
        TextError: the file is missing or has no rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("Q")
        try:
            with path.open("rb") as file:
                while line := file.readline():
                    self._starts.append(file.tell() - len(line))
        except FileNotFoundError:
            raise TextError(f"{path}: not found; has the fetch stage run?") from None
        if not self._starts:
            raise TextError(f"{path}: found no rows, wanted at least one")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        """Raises TextError where the line is not a JSON object."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parsed(index, file.readline())

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for index, line in enumerate(file):
                yield self._parsed(index, line)

    def where(self, index: int) -> str:
        """A row's file and line, for errors."""
        return f"{self.path}, line {index + 1}"

    def _parsed(self, index: int, line: bytes) -> Row:
        try:
            text = line.decode("utf8")
            row = json.loads(text)
            if "\\ud" in text.lower():  # half of a surrogate pair is JSON, but no text
                json.dumps(row, ensure_ascii=False).encode("utf8")
        except ValueError as error:
            raise TextError(f"{self.where(index)}: not JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise TextError(f"{self.where(index)}: found {shown(row)}, wanted an object")
        return row


def texts(path: Path) -> list[str]:
    """The "text" of every row of a file, in order.

    Raises:
        TextError: naming file and line.
    """
    rows = Rows(path)
    return [text_of(row, rows.where(index)) for index, row in enumerate(rows)]


def text_of(row: Row, where: str) -> str:
    """The prose of a row.

    Args:
        where: file and line, for the error.

    Raises:
        TextError: it has no "text", or that is no string.
    """
    require_columns(row, ["text"], where)
    return _string(row["text"], f'{where}, "text"')


def messages_of(row: Row, where: str) -> list[dict[str, Any]]:
    """The dialogue of a row: messages, each with "role" and "content".

    Args:
        where: file and line, for the error.

    Raises:
        TextError: it has no "messages", or they are not such a list.
    """
    require_columns(row, ["messages"], where)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise TextError(f'{where}, "messages": found {shown(messages)}, wanted a list of messages')
    for number, message in enumerate(messages, start=1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise TextError(f'{here}: found {shown(message)}, wanted an object with "role" and "content"')
        for key in ("role", "content"):
            require_columns(message, [key], here)
            _string(message[key], f'{here}, "{key}"')
    return messages


def require_columns(row: Row, columns: Collection[str], where: str) -> None:
    """Refuse a row that lacks one of some keys.

    Raises:
        TextError: naming the row, the keys found and the one wanted.
    """
    for column in columns:
        if column not in row:
            raise TextError(f'{where}: found {", ".join(map(str, row)) or "no keys"}, wanted "{column}"')


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"{where}: found {shown(value)}, wanted a string")
    return value


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
