"""Run models over the windows of corpora, one block in memory at a time, and keep what metrics see of every token.

Several models that differ in the tensors of their blocks alone, such as the dense and the pruned one, run side by side: the base is read
once, and the logits of the same tokens are in memory together. Nothing of the size tokens x vocabulary is stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from tqdm import tqdm

from stages.checkpoint.model import Apply
from stages.errors import CheckpointError, of_model
from stages.evaluation.metric import Corpus, Metric, Observed, Predictions
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory, release_free_memory
from stages.streaming.stream import GPU_SHARE, Stream, read_ahead

LOGITS_AT_ONCE = 2**24  # numbers, of one model
MEMORY_SHARE = 0.5  # of what is free, for hidden states; beyond it they lie in a file
DENSE = "dense"

Keep = Callable[[Mapping[str, Sequence[torch.Tensor]]], None]
Variants = Mapping[str, Apply | None]  # name of a model -> what makes its tensors of the base's; None: they are the base's


class Score(NamedTuple):
    """likelihood: sum of the log-probabilities of a continuation's tokens, nats. greedy: whether each was the likeliest."""

    likelihood: float
    greedy: bool


def score_of(logits: torch.Tensor, tokens: list[int]) -> Score:
    """Score a continuation. Args: logits: [tokens, vocabulary], before each of `tokens`."""
    wanted = torch.tensor(tokens, device=logits.device)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    total = log_probabilities.gather(1, wanted[:, None]).sum().item()
    return Score(likelihood=total, greedy=bool((log_probabilities.argmax(dim=-1) == wanted).all()))


@dataclass(frozen=True, kw_only=True)
class StreamedModels:
    """Models with one block in memory at a time: the base, changed by each variant.

    scratch: directory for hidden states that do not fit in memory.
    """

    decoder: Decoder
    variants: Variants
    scratch: Path

    @torch.no_grad()
    def hidden(self, groups: Sequence[torch.Tensor], batch: int) -> dict[str, list[torch.Tensor]]:
        """Compute the outputs of the last block for each group of sequences; the base is read once for all.

        Args:
            groups: each [sequences, tokens], int64. batch: sequences per forward pass.

        Returns:
            For each variant and group [sequences, tokens, width], compute dtype.

        Raises:
            SparsesweepError: a variant's tensors cannot be made, or its outputs are not finite; says of which.
        """
        decoder, names = self.decoder, list(self.variants)
        memory = HostMemory(int(MEMORY_SHARE * psutil.virtual_memory().available), self.scratch)
        with decoder.before_blocks():
            share = GPU_SHARE / (len(groups) * len(names))
            first = [Stream(decoder, group, batch=batch, memory=memory, gpu_share=share) for group in groups]
        streams = {name: first if name == names[0] else [stream.clone() for stream in first] for name in names}
        with read_ahead(decoder, range(len(decoder.blocks))) as blocks:
            for index, tensors in enumerate(tqdm(blocks, desc="blocks", unit="block", total=len(decoder.blocks))):
                for name, apply in self.variants.items():
                    with of_model(name):
                        changed = {tensor: value if apply is None else apply(tensor, value) for tensor, value in tensors.items()}
                        if name == names[-1]:
                            tensors.clear()
                        with decoder.loaded(index, changed) as block:
                            for stream in streams[name]:
                                stream.advance(index, block)
        return {name: [stream.hidden for stream in streams[name]] for name in names}

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Yield a function from hidden states, [tokens, width], to logits, [tokens, vocabulary]."""
        with self.decoder.after_blocks():
            yield lambda hidden: self.decoder.logits(hidden[None].to(self.decoder.device))[0]

    @torch.no_grad()
    def observe(
        self,
        corpora: Sequence[Corpus],
        metrics: Sequence[Metric],
        known: Mapping[str, Sequence[torch.Tensor]] | None = None,
        keep: Keep | None = None,
    ) -> dict[str, dict[str, Observed]]:
        """Run all windows of all corpora, each on its own, and keep what the metrics see.

        Metrics that need the dense model are of the variants but DENSE, which must be among them or known then.

        Args:
            known: models whose last block's outputs are known -> these, see hidden. keep: is handed those of all models.

        Returns:
            Variant -> corpus -> what was observed, by name, on the host.

        Raises:
            CheckpointError: a log-probability is NaN or infinite where it must not be; names the corpus and the window, says of which
                variant. See hidden, too.
        """
        hidden: dict[str, Sequence[torch.Tensor]] = {**(known or {}), **self.hidden([corpus.windows for corpus in corpora], batch=1)}
        if keep is not None:
            keep(hidden)
        observed: dict[str, dict[str, dict[str, torch.Tensor]]] = {name: {} for name in hidden}
        with self.head() as logits:
            for number, corpus in enumerate(corpora):
                shape = (len(corpus.windows), corpus.windows.shape[1] - 1)
                for index, window in enumerate(tqdm(corpus.windows.to(self.decoder.device), desc=corpus.name, unit="window")):
                    states = {name: of_groups[number][index, :-1] for name, of_groups in hidden.items()}
                    for name, part, values in self._of_window(states, window[1:], metrics, logits):
                        with of_model(name):
                            _require_finite(values, corpus.name, index)
                        kept = observed[name].setdefault(corpus.name, {})
                        for key, value in values.items():
                            if key not in kept:  # at once: small tensors between freed logits would break the heap into pieces
                                kept[key] = torch.empty(shape)
                            kept[key][index, part] = value.float().cpu()
                    release_free_memory()
        return {name: dict(of_corpora) for name, of_corpora in observed.items()}

    def _of_window(
        self, states: Mapping[str, torch.Tensor], tokens: torch.Tensor, metrics: Sequence[Metric], logits: Any
    ) -> Iterator[tuple[str, slice, dict[str, torch.Tensor]]]:
        """Yield what is observed of each variant, some tokens of a window at a time, and which these are.

        Args:
            states: variant -> [tokens, width], those before each of `tokens`, [tokens].
        """
        at_once = max(1, LOGITS_AT_ONCE // self.decoder.model.config.get_text_config().vocab_size)
        needs_dense = any(metric.needs_dense for metric in metrics)
        for start in range(0, len(tokens), at_once):
            part = slice(start, start + at_once)
            predicted = {}
            for name in sorted(states, key=lambda name: name != DENSE):
                ours = torch.log_softmax(logits(states[name][part]).float(), dim=-1)
                if name == DENSE and needs_dense:
                    predicted[DENSE] = ours
                predictions = Predictions(tokens=tokens[part], log_probabilities=ours, dense=predicted.get(DENSE))
                values: dict[str, torch.Tensor] = {}
                for metric in metrics:
                    if not (metric.needs_dense and name == DENSE):
                        values |= metric.observe(predictions)
                yield name, part, values


def _require_finite(values: Mapping[str, torch.Tensor], corpus: str, window: int) -> None:
    for name, value in values.items():
        if not value.isfinite().all():
            found = value[~value.isfinite()][0].item()
            raise CheckpointError(f"window {window} of {corpus}: found {name} {found}, wanted a finite number")
