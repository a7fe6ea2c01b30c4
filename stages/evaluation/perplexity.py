"""Perplexity by the published protocol: the corpus is joined, tokenised once and cut into windows; the remainder is dropped.

    perplexity = exp(mean over windows of the mean negative log-likelihood of all tokens of a window but the first)

as in the evaluations of SparseGPT and Wanda; logits in float32. Windows may begin with BOS, see stages/bos.py; published ones do not.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.bos import Bos
from stages.errors import CheckpointError, ConfigError

TOKENS_AT_ONCE = 256  # whose float32 logits are in memory together


@dataclass(kw_only=True, slots=True)
class WindowLosses:
    """Mean negative log-likelihood [nats per token] of each window."""

    losses: list[float]

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, windows taken as independent (delta method)."""
        return self.perplexity * standard_error(self.losses)

    def ratio(self, dense: "WindowLosses") -> tuple[float, float]:
        """The ratio to the dense model's perplexity, and its standard error from the paired differences of window losses."""
        differences = [loss - dense_loss for loss, dense_loss in zip(self.losses, dense.losses, strict=True)]
        ratio = math.exp(sum(differences) / len(differences))
        return ratio, ratio * standard_error(differences)


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of two or more values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def cut_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None, bos: Bos, evenly: bool = False
) -> torch.Tensor:
    """Join the documents and cut them into windows.

    Windows that begin with BOS hold one token of the text less, and all of these are scored.

    Args:
        texts: documents in order; joined by an empty line, as WikiText's rows are.
        length: tokens in a window.
        limit: number of windows, from the first on; None for all.
        bos: whether every window begins with BOS.
        evenly: whether they are spread evenly over all windows instead, the first among them.

    Returns:
        [windows, length], int64.

    Raises:
        ConfigError: the corpus gives fewer windows than `limit`, or fewer than two; says how many tokens there are.
    """
    tokens = tokenizer("\n\n".join(texts))["input_ids"]
    begin = [] if bos.token is None else [bos.token]
    tokens, length_of_text = bos.begin(tokens)[len(begin) :], length - len(begin)
    available = len(tokens) // length_of_text
    if available < (limit or 2):
        raise ConfigError(f"evaluation.perplexity: the corpus has {len(tokens)} tokens, wanted {limit or 2} windows of {length}")
    count = available if limit is None else limit
    pieces = torch.tensor(tokens[: available * length_of_text]).view(available, length_of_text)
    pieces = pieces[torch.arange(count) * available // count] if evenly else pieces[:count]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, len(begin)), pieces], dim=1)


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> WindowLosses:
    """Score each window on its own.

    Args:
        windows: [windows, tokens], int64.

    Raises:
        CheckpointError: a loss is NaN or infinite.
    """
    losses: list[float] = []
    for window in tqdm(windows.to(model.device), desc="perplexity", unit="window"):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(window_loss(logits, window, len(losses)))
    return WindowLosses(losses=losses)


def window_loss(logits: torch.Tensor, window: torch.Tensor, index: int) -> float:
    """Mean negative log-likelihood [nats per token] of a window's tokens but the first.

    Args:
        logits: [tokens - 1, vocabulary], any float dtype. window: [tokens], int64. index: index of the window, for the error.

    Raises:
        CheckpointError: the loss is NaN or infinite.
    """
    pieces = zip(logits.split(TOKENS_AT_ONCE), window[1:].split(TOKENS_AT_ONCE), strict=True)
    loss = sum(cross_entropy(piece.float(), tokens, reduction="sum").item() for piece, tokens in pieces) / (len(window) - 1)
    if not math.isfinite(loss):
        raise CheckpointError(f"perplexity window {index}: found loss {loss}, wanted a finite number")
    return loss
