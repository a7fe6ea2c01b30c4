"""The rows of a corpus or a benchmark: JSON Lines, read one row at a time by index, and checked.

A large file, such as C4's first shard, is never in memory as a whole. Errors name the file and line of the row.
"""

import json
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stages.errors import TextError
from stages.files import parsed_json

Row = dict[str, Any]
LONGEST = 60  # characters of a value shown in an error


class Rows:
    """The rows of a JSON Lines file, by index.

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
        """Read a row; raises TextError if the line is not a JSON object."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parsed(index, file.readline())

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for index, line in enumerate(file):
                yield self._parsed(index, line)

    def location(self, index: int) -> str:
        """A row's file and line, for errors."""
        return f"{self.path}, line {index + 1}"

    def _parsed(self, index: int, line: bytes) -> Row:
        try:
            text = line.decode("utf8")
            row = parsed_json(text)
            if "\\ud" in text.lower():  # half of a surrogate pair is JSON, but no text
                json.dumps(row, ensure_ascii=False).encode("utf8")
        except ValueError as error:
            raise TextError(f"{self.location(index)}: not JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise TextError(f"{self.location(index)}: found {shown(row)}, wanted an object")
        return row


def texts(path: Path) -> list[str]:
    """Read the "text" of every row of a file, in order.

    Raises:
        TextError: a row has no "text"; names file and line.
    """
    rows = Rows(path)
    return [text_of(row, rows.location(index)) for index, row in enumerate(rows)]


def text_of(row: Row, location: str) -> str:
    """The "text" of a row.

    Args:
        location: file and line, for the error.

    Raises:
        TextError: the row has no "text", or it is not a string.
    """
    require_columns(row, ["text"], location)
    return _string(row["text"], f'{location}, "text"')


def messages_of(row: Row, location: str) -> list[dict[str, Any]]:
    """The "messages" of a row, each with "role" and "content".

    Args:
        location: file and line, for the error.

    Raises:
        TextError: the row has no "messages", or they are not a list of such messages.
    """
    require_columns(row, ["messages"], location)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise TextError(f'{location}, "messages": found {shown(messages)}, wanted a list of messages')
    for number, message in enumerate(messages, start=1):
        message_location = f"{location}, message {number}"
        if not isinstance(message, dict):
            raise TextError(f'{message_location}: found {shown(message)}, wanted an object with "role" and "content"')
        for key in ("role", "content"):
            require_columns(message, [key], message_location)
            _string(message[key], f'{message_location}, "{key}"')
    return messages


def require_columns(row: Row, columns: Collection[str], location: str) -> None:
    """Refuse a row that lacks a column.

    Raises:
        TextError: names the row, its columns and the missing one.
    """
    for column in columns:
        if column not in row:
            raise TextError(f'{location}: found {", ".join(map(str, row)) or "no keys"}, wanted "{column}"')


def _string(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"{location}: found {shown(value)}, wanted a string")
    return value


def shown(value: Any) -> str:
    """A value as JSON, or as text where JSON has no such value, cut at LONGEST characters."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__} that JSON cannot hold"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
