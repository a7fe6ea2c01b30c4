"""Greedy continuations of prompts, raw and rendered by the chat template."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.bos import Bos


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
        row = {"prompt": prompt, "raw": _continue(model, tokenizer, bos.begin(tokenizer(prompt)["input_ids"]), new_tokens)}
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            row["chat"] = _continue(model, tokenizer, tokenizer(rendered, add_special_tokens=False)["input_ids"], new_tokens)
        rows.append(row)
    return rows


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_tokens: int) -> str:
    ids = torch.tensor([prompt], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
