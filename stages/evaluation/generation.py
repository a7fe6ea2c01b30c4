"""Greedy continuations of prompts, raw and rendered by the chat template."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.checkpoint.tokens import rendered, require_embedded
from stages.errors import TextError
from stages.rows import shown


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> list[dict[str, str]]:
    """Continue each prompt greedily.

    Args:
        new_tokens: upper bound of generated tokens per prompt.

    Returns:
        A row for each prompt: "prompt", "raw" and, where the tokenizer has a chat template, "chat".
    """
    rows = []
    for prompt in prompts:
        continuations = {kind: _continue(model, tokenizer, ids, new_tokens) for kind, ids in encodings(tokenizer, prompt).items()}
        rows.append({"prompt": prompt, **continuations})
    return rows


def encodings(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Any]:
    """The tokens of a prompt: "raw" and, where the tokenizer has a chat template, "chat".

    Raises:
        TextError: the chat template refuses the prompt.
    """
    encoded = {"raw": tokenizer(prompt, return_tensors="pt")}
    if tokenizer.chat_template:
        try:
            text = rendered(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        except TextError as error:
            advice = "choose others, or none with evaluation.generations.prompts=[]"
            raise TextError(f"evaluation.generations.prompts, {shown(prompt)}: {error}; {advice}") from error
        encoded["chat"] = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    return encoded


def require_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], embedding_rows: int | None) -> None:
    """Refuse prompts that the model cannot continue, before any weight is read.

    Raises:
        TextError: see encodings. CheckpointError: a token is beyond the embedding.
    """
    for prompt in prompts:
        for encoded in encodings(tokenizer, prompt).values():
            ids = encoded["input_ids"].flatten().tolist()
            require_embedded(ids, embedding_rows, tokenizer, f"evaluation.generations.prompts, {shown(prompt)}")


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: dict[str, torch.Tensor], new_tokens: int) -> str:
    ids = encoded["input_ids"].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
