"""Perplexity and zero-shot tasks of a model larger than memory: all sequences run through one block, then through the next."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.model import Apply
from stages.checkpoint.tokens import embedding_rows, require_requests
from stages.errors import SparsesweepError
from stages.evaluation.perplexity import WindowLosses, window_loss
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import GPU_SHARE, Stream, read_ahead

BUCKET = 32  # tokens: sequences are padded on the right to a multiple of it
CONTEXT_LENGTH = 2048  # tokens, where the checkpoint states none
MEMORY_SHARE = 0.5  # of what is free, for hidden states; beyond it they lie in a file


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A model with one block in memory at a time: the base, or the base changed by `apply`.

    apply: called with the name and the tensor of the checkpoint; returns the model's tensor; None: the base.
    scratch: directory for hidden states that do not fit in memory.
    """

    decoder: Decoder
    apply: Apply | None
    scratch: Path

    @torch.no_grad()
    def hidden(self, groups: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
        """Compute the outputs of the last block for each group of sequences; the model is read once for all groups.

        Args:
            groups: each [sequences, tokens], int64. batch: sequences per forward pass.

        Returns:
            For each group [sequences, tokens, width], compute dtype.
        """
        decoder = self.decoder
        memory = HostMemory(int(MEMORY_SHARE * psutil.virtual_memory().available), self.scratch)
        with decoder.before_blocks():
            gpu_share = GPU_SHARE / len(groups)
            streams = [Stream(decoder, group, batch=batch, memory=memory, gpu_share=gpu_share) for group in groups]
        with read_ahead(decoder, range(len(decoder.blocks))) as blocks:
            for index, tensors in enumerate(blocks):
                if self.apply is not None:
                    for name, tensor in tensors.items():
                        tensors[name] = self.apply(name, tensor)
                with decoder.loaded(index, tensors) as block:
                    for stream in streams:
                        stream.advance(index, block)
        return [stream.hidden for stream in streams]

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Yield a function from hidden states, [tokens, width], to logits, [tokens, vocabulary]."""
        with self.decoder.after_blocks():
            yield lambda hidden: self.decoder.logits(hidden[None].to(self.decoder.device))[0]

    @torch.no_grad()
    def window_losses(self, windows: torch.Tensor) -> WindowLosses:
        """Score each window on its own, as perplexity.window_losses does.

        Args:
            windows: [windows, tokens], int64.

        Raises:
            CheckpointError: a loss is NaN or infinite.
        """
        (hidden,) = self.hidden([windows], batch=1)
        with self.head() as logits:
            pairs = zip(hidden, windows.to(self.decoder.device), strict=True)
            return WindowLosses(losses=[window_loss(logits(states[:-1]), window, index) for index, (states, window) in enumerate(pairs)])

    @torch.no_grad()
    def continuation_scores(self, sequences: list[tuple[list[int], int]], batch: int) -> list[tuple[float, bool]]:
        """Score the last tokens of each sequence, given those before them.

        Args:
            sequences: tokens, and the number of tokens at the end that are scored.
            batch: sequences per forward pass.

        Returns:
            For each sequence the summed log-probability [nats], and whether every scored token is the most likely one.
        """
        buckets: dict[int, list[int]] = defaultdict(list)
        for number, (tokens, _) in enumerate(sequences):
            padded = -(-(len(tokens) - 1) // BUCKET) * BUCKET
            buckets[min(padded, self.decoder.checkpoint.context_length or padded)].append(number)
        groups = [
            torch.tensor([(sequences[n][0][:-1] + [0] * length)[:length] for n in members]) for length, members in sorted(buckets.items())
        ]
        scores: dict[int, tuple[float, bool]] = {}
        outputs = self.hidden(groups, batch)
        with self.head() as logits:
            for (_, members), hidden in zip(sorted(buckets.items()), outputs, strict=True):
                for number, states in zip(members, hidden, strict=True):
                    tokens, scored_tokens = sequences[number]
                    end = len(tokens) - 1
                    targets = torch.tensor(tokens[-scored_tokens:], device=self.decoder.device)
                    log_probabilities = torch.log_softmax(logits(states[end - scored_tokens : end]).float(), dim=-1)
                    total = log_probabilities.gather(1, targets[:, None]).sum().item()
                    scores[number] = total, bool((log_probabilities.argmax(dim=-1) == targets).all())
        return [scores[number] for number in range(len(sequences))]


class StreamedHarness(TemplateLM):
    """lm-eval's interface to a streamed model, which scores continuations and generates no text."""

    def __init__(self, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, bos: Bos, batch_size: int) -> None:
        super().__init__()
        self.streamed, self.tokenizer, self.bos, self.batch_size = model, tokenizer, bos, batch_size
        self.max_length = model.decoder.checkpoint.context_length or CONTEXT_LENGTH

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
        require_requests(requests, embedding_rows(self.streamed.decoder.checkpoint), self.tokenizer)
        sequences = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        return self.streamed.continuation_scores(sequences, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise SparsesweepError("evaluation.streamed: rolling likelihoods are not offered; no task of this project asks for them")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise SparsesweepError("evaluation.streamed: text is not generated; no task of this project asks for it")
