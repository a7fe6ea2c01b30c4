"""Styles of a prompt: the same questions asked in other forms, since a score may depend on the form.

raw        as the task has it, with its own number of examples
chat       rendered by the base's chat template
system     the same after a system prompt
few_shot   raw, after examples with their answers
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from stages.errors import TextError

if TYPE_CHECKING:  # the sections import this file, and transformers takes a second to import
    from transformers import PreTrainedTokenizerBase


class Style(StrEnum):
    """See the head of this file."""

    RAW = "raw"
    CHAT = "chat"
    SYSTEM = "system"
    FEW_SHOT = "few_shot"


RENDERED = (Style.CHAT, Style.SYSTEM)


@dataclass(frozen=True, kw_only=True)
class StyleProtocol:
    """How prompts were made in a style other than raw.

    few_shot: examples in the prompt; None: as in raw. system_prompt: see the section, or None. template_sha256: hash of the chat template,
    or None. skipped: why the style could not be used with this base; None: it was.
    """

    few_shot: int | None
    system_prompt: str | None
    template_sha256: str | None
    skipped: str | None


def refusal(style: str, tokenizer: "PreTrainedTokenizerBase", system_prompt: str) -> str | None:
    """Why a base's tokenizer cannot render a style; None if it can."""
    if style not in RENDERED:
        return None
    if not tokenizer.chat_template:
        return "the base's tokenizer has no chat template"
    messages = [{"role": "user", "content": "a question"}]
    if style == Style.SYSTEM:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = template(tokenizer)(messages)
    except TextError as error:
        return str(error)
    if style == Style.SYSTEM and system_prompt.strip() not in text:
        return "the base's chat template leaves out the system prompt"
    return None


def template(tokenizer: "PreTrainedTokenizerBase") -> Callable[..., str]:
    """The chat template as lm-eval calls it, except that a dialogue that it refuses is an error, a TextError, and no other is tried."""
    from stages.checkpoint.tokens import rendered  # here: see above

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return rendered(tokenizer, messages, **options)

    return render
