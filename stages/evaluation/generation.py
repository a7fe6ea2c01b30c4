"""Greedy continuations of prompts, raw and rendered by the chat template."""

import logging

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import prompt_ids, rendered, require_embedded
from stages.errors import TextError
from stages.rows import shown

log = logging.getLogger(__name__)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: Bos, prompts: list[str], new_tokens: int
) -> tuple[list[dict[str, str]], int]:
    """Continue each prompt greedily.

    Args:
        bos: whether a raw prompt begins with BOS; the chat template says so itself.
        new_tokens: upper bound of generated tokens per prompt.

    Returns:
        A row for each prompt: "prompt", "raw" and, where the tokenizer has a chat template, "chat", or "chat_refused", why the template
        refuses the prompt; and the number of tokens that were generated.
    """
    rows, generated = [], 0
    for prompt in tqdm(prompts, desc="prompts", unit="prompt"):
        encoded, refused = encodings(tokenizer, bos, prompt)
        row = {"prompt": prompt}
        for form, ids in encoded.items():
            tokens = _continue(model, tokenizer, ids, new_tokens)
            row[form] = tokenizer.decode(tokens, skip_special_tokens=True)
            generated += len(tokens)
        rows.append(row if refused is None else row | {"chat_refused": refused})
    return rows, generated


def encodings(tokenizer: PreTrainedTokenizerBase, bos: Bos, prompt: str) -> tuple[dict[str, list[int]], str | None]:
    """The tokens of a prompt: "raw" and, where the tokenizer has a chat template, "chat"; and why the template refuses it, or None."""
    encoded = {"raw": bos.begin(prompt_ids(tokenizer, prompt))}
    if not tokenizer.chat_template:
        return encoded, None
    try:
        text = rendered(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    except TextError as error:
        return encoded, str(error)
    return encoded | {"chat": tokenizer(text, add_special_tokens=False)["input_ids"]}, None


def require_prompts(
    tokenizer: PreTrainedTokenizerBase,
    bos: Bos,
    prompts: list[str],
    embedding_rows: int | None,
    *,
    new_tokens: int,
    context_length: int | None,
) -> None:
    """Refuse prompts that the model cannot continue, before any weight is read; warn of those that the chat template refuses.

    Args:
        new_tokens: upper bound of generated tokens per prompt. context_length: of the model [tokens]; None: it has no bound.

    Raises:
        TextError: a prompt has no token, or does not fit into the context with its continuation. CheckpointError: a token is beyond
            the embedding.
    """
    for prompt in prompts:
        name = f"evaluation.generations.prompts, {shown(prompt)}"
        encoded, refused = encodings(tokenizer, bos, prompt)
        for form, ids in encoded.items():
            if not ids:
                raise TextError(f"{name}: found no token ({form}), wanted at least one to continue")
            if context_length is not None and len(ids) + new_tokens > context_length:
                found = f"{len(ids)} tokens ({form}) and evaluation.generations.new_tokens={new_tokens}"
                raise TextError(f"{name}: found {found}, wanted at most the model's context of {context_length} together")
            require_embedded(ids, embedding_rows, tokenizer, name)
        if refused is not None:
            log.warning("%s: %s; it is continued raw alone", name, refused)


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_tokens: int) -> torch.Tensor:
    """The tokens that follow, [tokens], int64, at most `new_tokens`."""
    ids = torch.tensor([prompt], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return output[0, ids.shape[1] :]
