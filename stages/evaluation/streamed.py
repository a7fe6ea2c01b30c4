"""Zero-shot tasks of a model larger than memory: all sequences run through one block, then through the next."""

from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import embedding_rows, require_requests
from stages.errors import SparsesweepError
from stages.evaluation.scoring import StreamedModels

BUCKET = 32  # tokens: sequences are padded on the right to a multiple of it
CONTEXT_LENGTH = 2048  # tokens, where the checkpoint states none


@torch.no_grad()
def continuation_scores(models: StreamedModels, sequences: list[tuple[list[int], int]], batch: int) -> list[tuple[float, bool]]:
    """Score the last tokens of each sequence, given those before them.

    Args:
        models: of a single variant. sequences: tokens, and the number of tokens at the end that are scored.
        batch: sequences per forward pass.

    Returns:
        For each sequence the summed log-probability [nats], and whether every scored token is the most likely one.
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
                targets = torch.tensor(tokens[-scored_tokens:], device=models.decoder.device)
                log_probabilities = torch.log_softmax(logits(states[end - scored_tokens : end]).float(), dim=-1)
                total = log_probabilities.gather(1, targets[:, None]).sum().item()
                scores[number] = total, bool((log_probabilities.argmax(dim=-1) == targets).all())
    return [scores[number] for number in range(len(sequences))]


class StreamedHarness(TemplateLM):
    """lm-eval's interface to a streamed model, which scores continuations and generates no text."""

    def __init__(self, models: StreamedModels, tokenizer: PreTrainedTokenizerBase, bos: Bos, batch_size: int) -> None:
        super().__init__()
        self.models, self.tokenizer, self.bos, self.batch_size = models, tokenizer, bos, batch_size
        self.max_length = models.decoder.checkpoint.context_length or CONTEXT_LENGTH

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_special_tokens=False)
        return self.bos.begin(self.tokenizer.encode(string))

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        require_requests(requests, embedding_rows(self.models.decoder.checkpoint), self.tokenizer)
        sequences = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        return continuation_scores(self.models, sequences, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise SparsesweepError("evaluation.streamed: rolling likelihoods are not offered; no task of this project asks for them")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise SparsesweepError("evaluation.streamed: text is not generated; no task of this project asks for it")
