"""Zero-shot tasks of a model larger than memory: all sequences run through one block, then through the next."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import embedding_rows, require_requests
from stages.evaluation.encoding import Encoder
from stages.evaluation.scoring import StreamedModels, score_of

BUCKET = 32  # tokens: sequences are padded on the right to a multiple of it


@torch.no_grad()
def continuation_scores(models: StreamedModels, sequences: list[tuple[list[int], int]], batch: int) -> list[tuple[float, bool]]:
    """Score the last tokens of each sequence, given those before them.

    Args:
        models: of a single variant. sequences: tokens, and the number of tokens at the end that are scored.
        batch: sequences per forward pass.

    Returns:
        One of each sequence.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, (tokens, _) in enumerate(sequences):
        padded = -(-(len(tokens) - 1) // BUCKET) * BUCKET
        buckets[min(padded, models.decoder.checkpoint.context_length or padded)].append(number)
    groups = [
        torch.tensor([(sequences[n][0][:-1] + [0] * length)[:length] for n in members]) for length, members in sorted(buckets.items())
    ]
    scores: dict[int, tuple[float, bool]] = {}
    (outputs,) = models.hidden(groups, batch).values()
    with models.head() as logits:
        for (_, members), hidden in zip(sorted(buckets.items()), outputs, strict=True):
            for number, states in zip(members, hidden, strict=True):
                tokens, scored_tokens = sequences[number]
                end = len(tokens) - 1
                scores[number] = score_of(logits(states[end - scored_tokens : end]), tokens[-scored_tokens:])
    return [scores[number] for number in range(len(sequences))]


class StreamedHarness(Encoder):
    """lm-eval's interface to a streamed model, which scores continuations and whole texts.

    Args:
        models: of a single variant. whole: makes lm-eval's interface to the same model in memory, which generates text.
    """

    def __init__(
        self, models: StreamedModels, tokenizer: PreTrainedTokenizerBase, bos: Bos, batch_size: int, whole: Callable[[], LM]
    ) -> None:
        super().__init__(tokenizer, bos, models.decoder.checkpoint.context_length)
        self.models, self.batch_size, self.whole = models, batch_size, whole

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        require_requests(requests, embedding_rows(self.models.decoder.checkpoint), self.tokenizer)
        sequences = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        return continuation_scores(self.models, sequences, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts: every token given as many before it as fit, the first given the prefix token; see lm_eval.utils."""
        rolled: list[tuple[None, list[int], list[int]]] = []
        numbers: list[int] = []
        for number, instance in enumerate(requests):
            tokens = self.tokenizer.encode(instance.args[0], add_special_tokens=self.bos.token is None)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            rolled += [(None, *make_disjoint_window(window)) for window in windows]
            numbers += [number] * (len(rolled) - len(numbers))
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(numbers, self._loglikelihood_tokens(rolled), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return cast(list[str], self.whole().generate_until(requests, disable_tqdm=disable_tqdm))
