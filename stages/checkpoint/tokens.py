"""What a base's tokenizer makes of text, checked: dialogues by its chat template, ids against the rows of the embedding."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, TextError

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tokens_embed.weight")
REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what a template raises


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> str:
    """Render a dialogue by the tokenizer's chat template.

    Args:
        messages: each with "role" and "content". options: of apply_chat_template.

    Raises:
        TextError: the template refuses the dialogue, or prints the text of none of its messages; has the template's words.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except REFUSALS as error:
        raise TextError(f"the base's chat template refuses this dialogue ({error})") from error
    if not any(message["content"].strip() and message["content"].strip() in text for message in messages):
        raise TextError("the base's chat template prints the text of none of this dialogue's messages")
    return text


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
