"""JSON Lines as a sequence of documents, read when asked for: C4's first shard never lies in memory whole."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.errors import CalibrationError


class Rows:
    """The rows of a JSON Lines file by their number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("Q")
        with path.open("rb") as file:
            while line := file.readline():
                self._starts.append(file.tell() - len(line))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            yield from map(json.loads, file)


class Documents:
    """Rows as token sequences: prose as it is, dialogues through the model's own chat template.

    Args:
        rows: each with "text", or with "messages" of "role" and "content".
        tokenizer: adds its start token to prose, if it has that habit; a chat template says itself what it adds.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows = rows
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def end(self) -> int | None:
        """Id of the token that ends a document; None for dialogues, whose template ends them, and for tokenizers without."""
        return None if "messages" in self.rows[0] else self.tokenizer.eos_token_id

    def __getitem__(self, index: int) -> list[int]:
        row = self.rows[index]
        if "messages" in row:
            if self.tokenizer.chat_template is None:
                raise CalibrationError("its rows are dialogues, and the base's tokenizer has no chat template to render them with")
            rendered = self.tokenizer.apply_chat_template(row["messages"], tokenize=False)
            return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return self.tokenizer(row["text"])["input_ids"]
