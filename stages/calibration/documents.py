"""Tokenise rows: prose as it is, dialogues as rendered by the model's own chat template."""

from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.errors import CalibrationError, TextError
from stages.rows import Row, Rows, messages_of, text_of


class Documents:
    """The token sequences of a corpus, by index. All rows are prose or all are dialogues, as the first row is.

    Args:
        rows: each with "text", or with "messages" of "role" and "content".
        tokenizer: adds its start token to prose, if it does so by default; for dialogues the chat template adds special tokens.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows = rows
        self.tokenizer = tokenizer

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
        """The tokens of a row.

        Raises:
            TextError: the row is not of the kind of the first row; names file and line.
            CalibrationError: the row is a dialogue, and the base's tokenizer has no chat template.
        """
        row, location = self.rows[index], self.rows.location(index)
        if self.dialogues:
            return self._dialogue(row, location)
        return self.tokenizer(text_of(row, location))["input_ids"]

    def _dialogue(self, row: Row, location: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise CalibrationError("its rows are dialogues, and the base's tokenizer has no chat template to render them with")
        try:
            rendered = self.tokenizer.apply_chat_template(messages_of(row, location), tokenize=False)
        except TemplateError as error:
            raise TextError(f"{location}: the base's chat template does not take this dialogue ({error})") from None
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
