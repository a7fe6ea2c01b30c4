"""Log-likelihoods of continuations by a whole model, where tokens that several sequences begin with are computed once.

The answers to a multiple-choice question have its text in common, examples in a prompt are common to many questions. Sequences with a
common beginning become one: the beginning, then what each goes on with. A mask lets tokens attend to the beginning and to their own branch
alone, and each branch counts its positions from the end of the beginning. Logits are computed at the positions that are read.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from stages.evaluation.scoring import Score, score_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHORTEST = 8  # tokens: nothing is gained by sharing a shorter beginning
PADDING_AT_MOST = 128  # tokens of a pass: more cost as much as a further pass, which reads all weights
LOGITS_AT_ONCE = 2**26  # numbers
TOLERANCE = 1e-3, 1e-2  # absolute and relative, between the two ways on the first sequences that share a beginning
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)  # of a model that takes no mask of this form
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of kinds of layers
PADDING = -1  # the branch of tokens that belong to no row


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
    """Rows that begin alike, as one sequence: what they share, then the rest of each.

    shared: how many tokens they share; none of them is read.
    """

    rows: list[_Row]
    shared: int

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.shared + sum(len(row.inputs) - self.shared for row in self.rows)

    @property
    def tokens(self) -> torch.Tensor:
        """[length], int64."""
        return torch.tensor([*self.rows[0].inputs[: self.shared], *(token for row in self.rows for token in row.inputs[self.shared :])])

    @property
    def positions(self) -> torch.Tensor:
        """Of each token in its row, [length], int64."""
        return torch.cat([torch.arange(self.shared), *(torch.arange(self.shared, len(row.inputs)) for row in self.rows)])

    @property
    def branches(self) -> torch.Tensor:
        """Of each token the number of its row, from 1, [length], int64; 0 for those that all share."""
        counts = torch.tensor([self.shared, *(len(row.inputs) - self.shared for row in self.rows)])
        return torch.arange(len(counts)).repeat_interleave(counts)

    @cached_property
    def asked(self) -> list[tuple[_Asked, range]]:
        """Every continuation, and the places in the sequence where its tokens are predicted."""
        found, start = list[tuple[_Asked, range]](), 0
        for row in self.rows:
            found += [(one, range(start + one.first, start + one.first + len(one.tokens))) for one in row.asked]
            start += len(row.inputs) - self.shared
        return found


@dataclass(frozen=True)
class _Batch:
    """Groups that are one forward pass.

    masked: they are padded on the left, so that what is read lies at the end. Else each has one row, and is padded on the right, where
    nothing that is read attends.
    """

    groups: Sequence[_Group]
    masked: bool

    @cached_property
    def length(self) -> int:
        return max(group.length for group in self.groups)

    @property
    def starts(self) -> list[int]:
        """The place of each group's first token."""
        return [self.length - group.length if self.masked else 0 for group in self.groups]

    @property
    def padding(self) -> int:
        """Tokens that belong to no group."""
        return sum(self.length - group.length for group in self.groups)

    @cached_property
    def read(self) -> list[int]:
        """The places that are read of any group, in order."""
        asked = ((start, places) for start, group in zip(self.starts, self.groups, strict=True) for _, places in group.asked)
        return sorted({start + place for start, places in asked for place in places})


class SharedPrefixes:
    """Scores continuations by one model.

    Args:
        model: of transformers, with its weights.
        max_length: tokens that it takes; longer sequences lose tokens on the left, as in lm-eval.
        tokens_at_once: of a forward pass.
    """

    def __init__(self, model: "PreTrainedModel", max_length: int, tokens_at_once: int) -> None:
        self.model, self.max_length, self.tokens_at_once = model, max_length, tokens_at_once
        self.vocabulary = model.config.get_text_config().vocab_size
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shares: bool | None = None  # whether the model reads several rows as one sequence as it should; None: not tried yet
        self._kinds: set[str] = set()  # of layers that have a mask of their own
        self._window: int | None = None  # tokens that layers attend to, where any have a sliding window

    @torch.no_grad()
    def scores(self, requests: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
        """Score continuations, each after its context; yields the number of the request and its score, longest first.

        Args:
            requests: token ids of context and continuation, at least one of each.
        """
        rows = self._rows(requests)
        if self.shares is None and (first := next((group for group in _grouped(rows) if group.shared), None)) is not None:
            self.shares = self._shares_as_it_should(first)
        groups = _grouped(rows) if self.shares else _apart(rows)
        for batch in self._batches(groups, masked=bool(self.shares)):
            yield from self._of_batch(batch)

    def _rows(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[_Row]:
        rows: dict[tuple[int, ...], _Row] = {}
        for number, (context, continuation) in enumerate(requests):
            inputs = tuple((context + continuation)[-(self.max_length + 1) : -1])
            row = rows.setdefault(inputs, _Row(inputs=inputs))
            row.asked.append(_Asked(number=number, first=len(inputs) - len(continuation), tokens=continuation))
        return list(rows.values())

    def _shares_as_it_should(self, group: _Group) -> bool:
        """Whether the model attends to all that it has read, and gives the scores of a group that it gives row by row."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        kind, reason = type(self.model).__name__, "what sequences begin with is computed for each"
        try:
            probe = self.model(torch.tensor([group.rows[0].inputs[: group.shared]], device=self.model.device), use_cache=True)
        except REFUSALS:  # as of xLSTM at some sizes
            probe = None
        cache: Any = getattr(probe, "past_key_values", None)
        if type(cache) is not DynamicCache or not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            log.info("%s keeps more than keys and values: %s", kind, reason)
            return False
        windows = {layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers}
        short = {window for window in windows if window is not None and window < self.max_length}
        if short:
            (self._window, *others), types = short, set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
            self._kinds = types if len(windows) > 1 else set()
            if others or len(windows) > 1 and types != {FULL, SLIDING}:
                log.info("%s has several sliding windows: %s", kind, reason)
                return False
        few = _Group(rows=group.rows[:2], shared=group.shared)
        apart = dict(one for row in few.rows for one in self._of_batch(_Batch(_apart([row]), masked=False)))
        try:  # with a shorter sequence, so that one is padded
            ours = dict(self._of_batch(_Batch([*_apart(few.rows[:1]), few], masked=True)))
        except REFUSALS as error:
            log.info("%s takes no mask for several sequences in one (%s): %s", kind, error, reason)
            return False
        absolute, relative = TOLERANCE
        equal = all(abs(ours[key].likelihood - one.likelihood) <= absolute + relative * abs(one.likelihood) for key, one in apart.items())
        if not equal:
            log.warning("%s gives other scores of several sequences in one: %s", kind, reason)
        return equal

    def _batches(self, groups: Sequence[_Group], *, masked: bool) -> Iterator[_Batch]:
        """Groups of similar lengths, longest first, split where they are too many for one pass."""
        batch: list[_Group] = []
        for group in sorted((part for group in groups for part in self._parts(group, masked=masked)), key=lambda group: -group.length):
            extended = _Batch([*batch, group], masked)
            if batch and (extended.padding > PADDING_AT_MOST or not self._fits(extended)):
                yield _Batch(batch, masked)
                batch = []
            batch.append(group)
        if batch:
            yield _Batch(batch, masked)

    def _parts(self, group: _Group, *, masked: bool) -> Iterator[_Group]:
        rows: list[_Row] = []
        for row in group.rows:
            if rows and not self._fits(_Batch([_Group(rows=[*rows, row], shared=group.shared)], masked)):
                yield _Group(rows=rows, shared=group.shared)
                rows = []
            rows.append(row)
        yield _Group(rows=rows, shared=group.shared)

    def _fits(self, batch: _Batch) -> bool:
        count = len(batch.groups)
        return count * batch.length <= self.tokens_at_once and count * len(batch.read) * self.vocabulary <= LOGITS_AT_ONCE

    def _masks(self, branches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask of all layers, or one for each kind of them. Args: see _mask."""
        if not self._kinds:
            return _mask(branches, positions, self._window, self.model.dtype).to(self.model.device)
        windows = {kind: self._window if kind == SLIDING else None for kind in self._kinds}
        return {kind: _mask(branches, positions, window, self.model.dtype).to(self.model.device) for kind, window in windows.items()}

    def _of_batch(self, batch: _Batch) -> Iterator[tuple[int, Score]]:
        tokens, positions, branches = (torch.full((len(batch.groups), batch.length), fill) for fill in (0, 0, PADDING))
        for index, (group, start) in enumerate(zip(batch.groups, batch.starts, strict=True)):
            own = slice(start, start + group.length)
            tokens[index, own], positions[index, own], branches[index, own] = group.tokens, group.positions, group.branches
        device = self.model.device
        options: dict[str, Any] = {"use_cache": False}
        if batch.masked:
            options |= {"attention_mask": self._masks(branches, positions), "position_ids": positions.to(device)}
        if self.keeps_logits:
            options["logits_to_keep"] = torch.tensor(batch.read, device=device)
        logits = self.model(tokens.to(device), **options).logits
        where = {place: index for index, place in enumerate(batch.read if self.keeps_logits else range(batch.length))}
        for group, start, of_group in zip(batch.groups, batch.starts, logits, strict=True):
            for one, places in group.asked:
                first = where[start + places.start]  # and the others follow it
                yield one.number, score_of(of_group[first : first + len(places)], one.tokens)


def _mask(branches: torch.Tensor, positions: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the products of queries and keys, [groups, 1, length, length]: 0 where a token attends, else the lowest number.

    Args:
        branches, positions: [groups, length], see _Group; PADDING attends to itself, so that its sums are finite.
        window: to how many tokens up to itself a token attends; None: to all.
    """
    attended = ((branches[:, None] == 0) | (branches[:, None] == branches[..., None])).tril()
    if window is not None:
        attended &= positions[..., None] - positions[:, None] < window
    return torch.zeros(attended.shape, dtype=dtype).masked_fill_(~attended, torch.finfo(dtype).min)[:, None]


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
    return [group if len(group.rows) > 1 else _apart(group.rows)[0] for group in groups]


def _apart(rows: Sequence[_Row]) -> list[_Group]:
    """Every row as a sequence of its own."""
    return [_Group(rows=[row], shared=0) for row in rows]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
