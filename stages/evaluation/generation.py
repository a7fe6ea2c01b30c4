"""Greedy continuations of prompts, raw and rendered by the chat template."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import rendered, require_embedded
from stages.errors import TextError
from stages.rows import shown


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: Bos, prompts: list[str], new_tokens: int
) -> list[dict[str, str]]:
    """Continue each prompt greedily.

    Args:
        bos: whether a raw prompt begins with BOS; the chat template says so itself.
        new_tokens: upper bound of generated tokens per prompt.

    Returns:
        A row for each prompt: "prompt", "raw" and, where the tokenizer has a chat template, "chat".
    """
    rows = []
    for prompt in prompts:
        continuations = {kind: _continue(model, tokenizer, ids, new_tokens) for kind, ids in encodings(tokenizer, bos, prompt).items()}
        rows.append({"prompt": prompt, **continuations})
    return rows


def encodings(tokenizer: PreTrainedTokenizerBase, bos: Bos, prompt: str) -> dict[str, list[int]]:
    """The tokens of a prompt: "raw" and, where the tokenizer has a chat template, "chat".

    Raises:
        TextError: the chat template refuses the prompt.
    """
    encoded = {"raw": bos.begin(tokenizer(prompt)["input_ids"])}
    if tokenizer.chat_template:
        try:
            text = rendered(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        except TextError as error:
            advice = "choose others, or none with evaluation.generations.prompts=[]"
            raise TextError(f"evaluation.generations.prompts, {shown(prompt)}: {error}; {advice}") from error
        encoded["chat"] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


def require_prompts(tokenizer: PreTrainedTokenizerBase, bos: Bos, prompts: list[str], embedding_rows: int | None) -> None:
    """Refuse prompts that the model cannot continue, before any weight is read.

    Raises:
        TextError: see encodings. CheckpointError: a token is beyond the embedding.
    """
    for prompt in prompts:
        for ids in encodings(tokenizer, bos, prompt).values():
            require_embedded(ids, embedding_rows, tokenizer, f"evaluation.generations.prompts, {shown(prompt)}")


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_tokens: int) -> str:
    ids = torch.tensor([prompt], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
