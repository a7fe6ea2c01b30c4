"""Zero-shot tasks of a model larger than memory: all sequences run through one block, then through the next."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import embedding_rows, require_requests
from stages.errors import SparsesweepError
from stages.evaluation.encoding import Encoder
from stages.evaluation.scoring import Score, StreamedModels, score_of

BUCKET = 32  # tokens: sequences are padded on the right to a multiple of it

Sequence: TypeAlias = tuple[list[int], int]


@torch.no_grad()
def continuation_scores(models: StreamedModels, sequences: list[Sequence], batch: int) -> dict[str, list[Score]]:
    """Score the last tokens of each sequence, given those before them; the base is read once for all variants.

    Args:
        sequences: tokens, and the number of tokens at the end that are scored. batch: sequences per forward pass.

    Returns:
        Of each variant, one of each sequence.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, (tokens, _) in enumerate(sequences):
        padded = -(-(len(tokens) - 1) // BUCKET) * BUCKET
        buckets[min(padded, models.decoder.checkpoint.context_length or padded)].append(number)
    groups = [
        torch.tensor([(sequences[n][0][:-1] + [0] * length)[:length] for n in members]) for length, members in sorted(buckets.items())
    ]
    found: dict[str, dict[int, Score]] = {}
    outputs = models.hidden(groups, batch)
    with models.head() as logits:
        for name, of_groups in outputs.items():
            scores = found[name] = {}
            for (_, members), hidden in zip(sorted(buckets.items()), of_groups, strict=True):
                for number, states in zip(members, hidden, strict=True):
                    tokens, scored_tokens = sequences[number]
                    end = len(tokens) - 1
                    scores[number] = score_of(logits(states[end - scored_tokens : end]), tokens[-scored_tokens:])
    return {name: [scores[number] for number in range(len(sequences))] for name, scores in found.items()}


class SharedScores:
    """Scores of streamed models side by side: where one is asked, all are scored, and the others that are asked the same have theirs.

    Args:
        batch_size: sequences per forward pass.
    """

    def __init__(self, models: StreamedModels, batch_size: int) -> None:
        self.models, self.batch_size = models, batch_size
        self._asked: list[tuple[list[Sequence], dict[str, list[Score]]]] = []
        self._failed: dict[str, SparsesweepError] = {}

    def of(self, name: str, sequences: list[Sequence]) -> list[Score]:
        """Scores of one model.

        Args:
            name: of a variant. sequences: see continuation_scores.

        Raises:
            SparsesweepError: this variant cannot be scored; the others can, without it.
        """
        known = next((scores for asked, scores in self._asked if asked == sequences), None)
        while known is None and name not in self._failed:
            try:
                known = continuation_scores(self.models, sequences, self.batch_size)
            except SparsesweepError as error:
                if error.model is None or error.model not in self.models.variants:
                    raise
                self._failed[error.model] = error.with_traceback(None)  # which would keep all hidden states
                self.models = replace(self.models, variants={n: apply for n, apply in self.models.variants.items() if n != error.model})
            else:
                self._asked.append((sequences, known))
        if name in self._failed:
            raise self._failed[name]
        assert known is not None
        return known[name]


class StreamedHarness(Encoder):
    """lm-eval's interface to a streamed model, which scores continuations and whole texts.

    Args:
        scores: of the model, and of others side by side. name: of the variant. whole: makes lm-eval's interface to the same model in
            memory, which generates text.
    """

    def __init__(self, scores: SharedScores, name: str, tokenizer: PreTrainedTokenizerBase, bos: Bos, whole: Callable[[], LM]) -> None:
        self.checkpoint = scores.models.decoder.checkpoint
        super().__init__(tokenizer, bos, self.checkpoint.context_length)
        self.scores, self.name, self.whole = scores, name, whole

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        require_requests(requests, embedding_rows(self.checkpoint), self.tokenizer)
        sequences = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        return list(self.scores.of(self.name, sequences))

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
