"""The losses of a whole model in memory, window by window: a plain reference for what the evaluation streams."""

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

TOKENS_AT_ONCE = 256  # whose float32 logits are in memory together


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood [nats per token] of the tokens but the first of each window.

    Args:
        windows: [windows, tokens], int64.
    """
    return [window_loss(model(input_ids=window[None], use_cache=False).logits[0, :-1], window) for window in windows.to(model.device)]


def window_loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """The same of one window. Args: logits: [tokens - 1, vocabulary], any float dtype. window: [tokens], int64."""
    pieces = zip(logits.split(TOKENS_AT_ONCE), window[1:].split(TOKENS_AT_ONCE), strict=True)
    return sum(cross_entropy(piece.float(), tokens, reduction="sum").item() for piece, tokens in pieces) / (len(window) - 1)
