"""Tokenise rows: prose as it is, dialogues as rendered by the model's own chat template."""

import hashlib
import json
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from stages.checkpoint.tokens import rendered
from stages.errors import CalibrationError, TextError
from stages.rows import Row, Rows, messages_of, text_of


class Documents:
    """The token sequences of a corpus, by index. All rows are prose or all are dialogues, as the first row is.

    Args:
        rows: each with "text", or with "messages" of "role" and "content".
        tokenizer: adds its start token to prose, if it does so by default; for dialogues the chat template adds special tokens.
        max_refused: the share of the dialogues read that the chat template may refuse; these are documents without tokens.

    Attributes:
        refused: index of a dialogue that the chat template refused -> why.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_refused: float = 0.0) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.max_refused = max_refused
        self.refused: dict[int, str] = {}
        self._read: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def dialogues(self) -> bool:
        """Whether the rows are dialogues.

        Raises:
            TextError: the first row has neither "text" nor "messages".
        """
        first = self.rows[0]
        if not {"text", "messages"} & set(first):
            keys = ", ".join(first) or "no keys"
            raise TextError(f'{self.rows.location(0)}: found {keys}, wanted "text" for prose or "messages" for a dialogue')
        return "messages" in first

    @property
    def end(self) -> int | None:
        """Id of the token that ends a document; None for dialogues, which the template ends, and for tokenizers without such a token."""
        return None if self.dialogues else self.tokenizer.eos_token_id

    def __getitem__(self, index: int) -> list[int]:
        """The tokens of a row; none of one that is blank.

        Raises:
            TextError: the row is not of the kind of the first row; names file and line. Or too many dialogues were refused.
            CalibrationError: the row is a dialogue, and the base's tokenizer has no chat template.
        """
        row, location = self.rows[index], self.rows.location(index)
        if self.dialogues:
            return self._dialogue(index, row, location)
        text = text_of(row, location)
        return self.tokenizer(text)["input_ids"] if text.strip() else []  # else BOS alone, of tokenizers that add it

    def content(self, index: int) -> bytes:
        """A hash of a row: rows of the same text have the same."""
        return hashlib.sha256(json.dumps(self.rows[index], sort_keys=True).encode()).digest()

    def require_few_refused(self) -> None:
        """Refuse a corpus of which the chat template refused more than max_refused of the dialogues that were read.

        Raises:
            TextError: names the first of them, the template's words, and how many there are.
        """
        self._require_few_refused(len(self._read))

    def _require_few_refused(self, read: int) -> None:
        if len(self.refused) > self.max_refused * read:
            first = next(iter(self.refused.values()))
            wanted = f"wanted at most calibration.max_refused = {self.max_refused:g} of the rows read"
            raise TextError(f"{first}; found {len(self.refused)} such rows in {read}, {wanted}; leave them out, or allow more")

    def _dialogue(self, index: int, row: Row, location: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise CalibrationError("its rows are dialogues, and the base's tokenizer has no chat template to render them with")
        messages = messages_of(row, location)
        self._read.add(index)
        try:
            text = rendered(self.tokenizer, messages)
        except TextError as error:
            self.refused[index] = f"{location}: {error}"
            self._require_few_refused(len(self))  # however many are still read
            return []
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
