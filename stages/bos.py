"""BOS: whether every window and every prompt begins with the tokenizer's beginning-of-sequence token.

Some models are trained with it at the first position of every sequence and predict badly without it, since the first token takes up
much of their attention; others never saw it there.

    never    text stays as the tokenizer makes it and is cut as published: a tokenizer that adds BOS by itself adds it once to a
             document, and windows cut out of the middle have none
    always   every window and every prompt begins with it, once
    auto     always, if the tokenizer adds BOS to plain text, if its configuration sets add_bos_token, or if its chat template puts
             BOS once before a whole conversation; else never. A token that begins every turn, such as <|im_start|>, is a mark of
             turns, and no reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from stages.errors import TextError
from stages.schema import one_of, require

if TYPE_CHECKING:  # the sections import this file, and transformers takes a second to import
    from transformers import PreTrainedTokenizerBase

CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


class BosSetting(StrEnum):
    """The setting `bos` of calibration and evaluation, see the head of this file."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def bos_field() -> Any:
    """A field for a BosSetting."""
    return one_of(*BosSetting)


@dataclass(frozen=True, kw_only=True)
class Bos:
    """The decision for one tokenizer.

    token: id of the token that every window and prompt begins with, or None: text stays as the tokenizer makes it.
    reason: why it was decided so.
    """

    token: int | None
    reason: str

    def begin(self, ids: Sequence[int]) -> list[int]:
        """Put BOS first, once; without a decision for BOS the ids stay as they are."""
        ids = list(ids)
        if self.token is None:
            return ids
        while ids[:1] == [self.token]:
            ids = ids[1:]
        return [self.token, *ids]

    @property
    def words(self) -> str:
        """A clause for tables and cards: ", each begun with BOS", or that none is."""
        return words(self.token)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def words(token: int | None) -> str:
    """See Bos.words; token: see Bos."""
    return f", {'none' if token is None else 'each'} begun with BOS"


def decide(setting: str, tokenizer: "PreTrainedTokenizerBase", key: str) -> Bos:
    """Decide for a tokenizer.

    Args:
        setting: a BosSetting. key: of the configuration, for the error.

    Raises:
        ConfigError: BOS is asked for, and the tokenizer has none; names the key.
    """
    token = tokenizer.bos_token_id
    if setting == BosSetting.ALWAYS:
        require(token is not None, key, setting, "auto or never: this tokenizer has no BOS token")
        return Bos(token=token, reason=f"{key} is always")
    if setting == BosSetting.NEVER:
        return Bos(token=None, reason=f"{key} is never")
    if token is None:
        return Bos(token=None, reason="the tokenizer has no BOS token")
    if tokenizer("a")["input_ids"][:1] == [token]:
        return Bos(token=token, reason="the tokenizer adds it to plain text")
    if getattr(tokenizer, "add_bos_token", None) is True or tokenizer.init_kwargs.get("add_bos_token") is True:
        return Bos(token=token, reason="add_bos_token is set in the tokenizer's configuration")
    if _begins_conversations(tokenizer, token):
        return Bos(token=token, reason="the chat template puts it once before a conversation")
    return Bos(token=None, reason="neither the tokenizer nor its chat template begins a text with it")


def _begins_conversations(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    """Whether the chat template puts BOS before a conversation, and nowhere else in it."""
    if not tokenizer.chat_template:
        return False
    from stages.checkpoint.tokens import rendered  # here: see above

    try:
        text = rendered(tokenizer, CONVERSATION)
    except TextError:  # it asks for other roles, or the tokenizer has several templates
        return False
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:1] == [token] and ids.count(token) == 1
