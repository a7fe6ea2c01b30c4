"""What a base's tokenizer makes of text, checked: dialogues by its chat template, ids against the rows of the embedding."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, TextError

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tokens_embed.weight")
# What transformers raises on a damaged file.
UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
TODAY = datetime(2024, 7, 26)  # to chat templates that print the date: else no dialogue would be the same again tomorrow
REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what a template raises


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a checkpoint's directory.

    Raises:
        CheckpointError: transformers cannot; has its words.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except UNREADABLE as error:
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"{directory}: found no tokenizer that transformers can load ({words}), wanted one with the weights"
        ) from error


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> str:
    """Render a dialogue by the tokenizer's chat template, to which it is always the same day, see TODAY.

    Args:
        messages: each with "role" and "content". options: of apply_chat_template.

    Raises:
        TextError: the template refuses the dialogue, or prints the text of none of its messages; has the template's words.
    """
    try:
        with _today():
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except REFUSALS as error:
        raise TextError(f"the base's chat template refuses this dialogue ({error})") from error
    if not any(message["content"].strip() and message["content"].strip() in text for message in messages):
        raise TextError("the base's chat template prints the text of none of this dialogue's messages")
    return text


@contextmanager
def _today() -> Iterator[None]:
    """Let it be TODAY to strftime_now, which transformers hands to templates; no argument replaces it."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: TODAY)
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that is to be gone on with: with what the tokenizer puts before every text, without what it puts after it.

    Such as EOS, by tokenizers that were saved with add_eos_token for training: a model that reads it begins another text.
    """
    ids: list[int] = tokenizer.encode(text)
    return ids[: len(ids) - _added_at_end(tokenizer)]


@lru_cache(maxsize=4)  # it is asked for every prompt
def _added_at_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    ends = range(len(whole), len(plain) - 1, -1)
    return next((len(whole) - end for end in ends if whole[end - len(plain) : end] == plain), 0)


def embedding_rows(base: Checkpoint) -> int | None:
    """Rows of the base's input embedding, or None where neither its tensors nor its config say so."""
    sizes = base.stated("vocab_size")
    sizes += [base.shape(name)[0] for name in base if name.endswith(EMBEDDINGS) and base.shape(name)]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def require_embedded(ids: Collection[int], rows: int | None, tokenizer: "PreTrainedTokenizerBase", subject: str) -> None:
    """Refuse ids of tokens that the embedding has no row for.

    Args:
        rows: those of the embedding; None: not known, and nothing is refused. subject: what the ids are of, for the error.

    Raises:
        CheckpointError: names the token, its id and the rows.
    """
    highest = max(ids, default=0)
    if rows is not None and highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise CheckpointError(
            f"{subject}: found the token {token!r} with id {highest}, wanted ids below {rows}, the rows of the base's embedding; "
            "tokenizer and weights do not belong together: was a token added without a call of resize_token_embeddings?"
        )


def require_requests(requests: list[Any], rows: int | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse tasks with a token beyond the embedding, see require_embedded.

    Args:
        requests: of lm-eval: the strings, the ids of the context, and those of the continuation.
    """
    for _, context, continuation in requests:
        require_embedded([*context, *continuation], rows, tokenizer, "evaluation.tasks")
