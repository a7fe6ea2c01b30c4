"""Log-likelihoods of continuations by a whole model, where tokens that several sequences begin with are computed once.

The answers to a multiple-choice question have its text in common, examples in a prompt are common to many questions. Of sequences with a
common beginning the model reads it once, with a cache of keys and values; each goes on from a copy of the cache. Logits are computed from
the first position on whose prediction is read. Sequences are padded on the right, where nothing that is read attends.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from stages.evaluation.scoring import Score, score_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHORTEST = 8  # tokens: a shorter beginning is not worth a pass of its own
LOGITS_AT_ONCE = 2**26  # numbers
TOLERANCE = 1e-3, 1e-2  # absolute and relative, between the two ways on the first sequences that share a beginning


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A continuation. number: of the request. first: position in the inputs whose prediction is its first token. tokens: its own."""

    number: int
    first: int
    tokens: list[int]


@dataclass(kw_only=True)
class _Row:
    """Inputs, and all continuations whose predictions they give."""

    inputs: tuple[int, ...]
    asked: list[_Asked] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The first position that is read."""
        return min(one.first for one in self.asked)


@dataclass(kw_only=True)
class _Group:
    """Rows that begin alike. shared: how many of their tokens are computed once; none of them is read."""

    rows: list[_Row]
    shared: int

    @property
    def longest(self) -> int:
        """Tokens after the shared ones."""
        return max(len(row.inputs) for row in self.rows) - self.shared


class SharedPrefixes:
    """Scores continuations by one model.

    Args:
        model: of transformers, with its weights.
        max_length: tokens that it takes; longer sequences lose tokens on the left, as in lm-eval.
        tokens_at_once: of a forward pass, with those that lie in the cache.
    """

    def __init__(self, model: "PreTrainedModel", max_length: int, tokens_at_once: int) -> None:
        self.model, self.max_length, self.tokens_at_once = model, max_length, tokens_at_once
        self.vocabulary = model.config.get_text_config().vocab_size
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shares: bool | None = None  # whether the model goes on from a cache as it should; None: not tried yet

    @torch.no_grad()
    def scores(self, requests: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
        """Score continuations, each after its context; yields the number of the request and its score, longest first.

        Args:
            requests: token ids of context and continuation, at least one of each.
        """
        rows = self._rows(requests)
        groups = _grouped(rows)
        if self.shares is None and (first := next((group for group in groups if group.shared), None)) is not None:
            self.shares = self._goes_on_as_it_should(first)
        if not self.shares:
            groups = [_Group(rows=[row], shared=0) for row in rows]
        for batch in self._batches(groups):
            yield from self._of_batch(batch)

    def _rows(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[_Row]:
        rows: dict[tuple[int, ...], _Row] = {}
        for number, (context, continuation) in enumerate(requests):
            inputs = tuple((context + continuation)[-(self.max_length + 1) : -1])
            row = rows.setdefault(inputs, _Row(inputs=inputs))
            row.asked.append(_Asked(number=number, first=len(inputs) - len(continuation), tokens=continuation))
        return list(rows.values())

    def _goes_on_as_it_should(self, group: _Group) -> bool:
        """Whether the model has plain keys and values to go on from, and gives the scores of a group that it gives without."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        probe = self.model(torch.tensor([group.rows[0].inputs[: group.shared]], device=self.model.device), use_cache=True)
        cache = getattr(probe, "past_key_values", None)
        plain = (
            isinstance(cache, DynamicCache)
            and type(cache) is DynamicCache
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        )
        if not plain:
            log.info("%s keeps more than keys and values: what sequences begin with is computed for each", type(self.model).__name__)
            return False
        few = _Group(rows=group.rows[:2], shared=group.shared)
        ours = dict(self._of_batch([few]))
        apart = dict(one for row in few.rows for one in self._of_batch([_Group(rows=[row], shared=0)]))
        absolute, relative = TOLERANCE
        equal = all(abs(ours[key].likelihood - one.likelihood) <= absolute + relative * abs(one.likelihood) for key, one in apart.items())
        if not equal:
            log.warning("%s gives other scores from a cache: what sequences begin with is computed for each", type(self.model).__name__)
        return equal

    def _batches(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Groups with as many shared tokens, split where they are too many for one pass."""
        batch: list[_Group] = []
        for group in sorted(groups, key=lambda group: (-group.shared, -group.longest)):
            for part in self._parts(group):
                if batch and (part.shared != batch[0].shared or not self._fits([*batch, part])):
                    yield batch
                    batch = []
                batch.append(part)
        if batch:
            yield batch

    def _parts(self, group: _Group) -> Iterator[_Group]:
        rows: list[_Row] = []
        for row in group.rows:
            if rows and not self._fits([_Group(rows=[*rows, row], shared=group.shared)]):
                yield _Group(rows=rows, shared=group.shared)
                rows = []
            rows.append(row)
        yield _Group(rows=rows, shared=group.shared)

    def _fits(self, batch: list[_Group]) -> bool:
        rows, longest = sum(len(group.rows) for group in batch), max(group.longest for group in batch)
        return rows * (batch[0].shared + longest) <= self.tokens_at_once and rows * longest * self.vocabulary <= LOGITS_AT_ONCE

    def _of_batch(self, batch: list[_Group]) -> Iterator[tuple[int, Score]]:
        shared, rows = batch[0].shared, [row for group in batch for row in group.rows]
        longest, start = max(group.longest for group in batch), min(row.first for row in rows) - shared
        inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            inputs[index, : len(row.inputs) - shared] = torch.tensor(row.inputs[shared:])
        options: dict[str, Any] = {}
        if self.keeps_logits:
            options["logits_to_keep"] = torch.arange(start, longest, device=self.model.device)
        if shared:
            options |= {"past_key_values": self._cache(batch), "use_cache": True}
        else:
            options["use_cache"] = False
        logits = self.model(inputs.to(self.model.device), **options).logits
        if not self.keeps_logits:
            logits = logits[:, start:]
        for row, of_row in zip(rows, logits, strict=True):
            for one in row.asked:
                yield one.number, score_of(of_row[one.first - shared - start :][: len(one.tokens)], one.tokens)

    def _cache(self, batch: list[_Group]) -> Any:
        """Keys and values of the shared tokens, once for each row."""
        prefixes = torch.tensor([group.rows[0].inputs[: group.shared] for group in batch], device=self.model.device)
        options: dict[str, Any] = {"logits_to_keep": 1} if self.keeps_logits else {}
        cache = self.model(prefixes, use_cache=True, **options).past_key_values
        which = [index for index, group in enumerate(batch) for _ in group.rows]
        if which != list(range(len(batch))):
            cache.batch_select_indices(torch.tensor(which, device=self.model.device))
        return cache


def _grouped(rows: list[_Row]) -> list[_Group]:
    """Put rows together as long as that makes fewer tokens to compute.

    A group of n rows that share p tokens costs p tokens and what is left of each row. With one row more, and q shared tokens, it costs
    n (p - q) - p tokens more than apart. At least half of what comes before the new row's continuation must be shared.
    """
    groups: list[_Group] = []
    for row in sorted(rows, key=lambda row: row.inputs):
        if groups:
            group = groups[-1]
            shared = min(_alike(group.rows[0].inputs, row.inputs), group.shared, row.first)
            saves = len(group.rows) * (group.shared - shared) < group.shared
            if saves and shared >= SHORTEST and 2 * shared >= row.first:
                group.rows.append(row)
                group.shared = shared
                continue
        groups.append(_Group(rows=[row], shared=row.first))
    return [group if len(group.rows) > 1 else _Group(rows=group.rows, shared=0) for group in groups]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
