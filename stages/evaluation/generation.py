"""Greedy continuations of prompts, raw and rendered by the chat template."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> list[dict[str, str]]:
    """Continue each prompt greedily.

    Args:
        new_tokens: upper bound of generated tokens per prompt.

    Returns:
        A row for each prompt: "prompt", "raw" and, where the tokenizer has a chat template, "chat".
    """
    rows = []
    for prompt in prompts:
        row = {"prompt": prompt, "raw": _continue(model, tokenizer, tokenizer(prompt, return_tensors="pt"), new_tokens)}
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            encoded = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
            row["chat"] = _continue(model, tokenizer, encoded, new_tokens)
        rows.append(row)
    return rows


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: dict[str, torch.Tensor], new_tokens: int) -> str:
    ids = encoded["input_ids"].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
