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
CUT, LIKELY = 8, 16  # it is tried whether the last so many tokens change the probabilities of so many likely tokens before them
TOLERANCES = {torch.float32: (1e-2, 0.0), torch.float64: (1e-2, 0.0)}  # of a score in both ways, absolute [nats] and relative
OF_HALVES = (0.1, 5e-3)  # the same in 16 bits
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)  # of a model that takes no mask of this form
OF_ALL_POSITIONS = ("dynamic", "longrope")  # kinds of rotary embeddings that depend on the longest sequence of a pass
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of kinds of layers
APART = "what sequences begin with is computed for each"
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
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(len(row.inputs) for row in self.rows)

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

    @property
    def asked(self) -> list[tuple[_Asked, int, range]]:
        """Every continuation, the index of its group, and the places where its tokens are predicted."""
        found = list[tuple[_Asked, int, range]]()
        for index, (group, start) in enumerate(zip(self.groups, self.starts, strict=True)):
            found += [(one, index, range(start + places.start, start + places.stop)) for one, places in group.asked]
        return found


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
        self.shares: bool | None = None  # whether the model reads several rows as one sequence as it should; None: not tried yet
        self._tried = {"sequence": 0, "row": 0}  # tokens of the longest that were tried: a sequence of several rows, and a row in such
        self._tried_alone = 0  # tokens of the longest row that was tried with others after it
        self._padding = PADDING_AT_MOST
        self._kinds: set[str] = set()  # of layers that have a mask of their own
        self._window: int | None = None  # tokens that layers attend to, where any have a sliding window

    @torch.no_grad()
    def scores(self, requests: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
        """Score continuations, each after its context; yields the number of the request and its score, longest first.

        Args:
            requests: token ids of context and continuation, at least one of each.
        """
        rows = self._rows(requests)
        groups = [part for group in _grouped(rows) for part in self._parts(group)]
        if self.shares or (self.shares is None and any(len(group.rows) > 1 for group in groups)):
            scored = self._tried_on(groups)
            self.shares = scored is not None
            groups = [group for group in groups if not any(one.number in (scored or {}) for one, _ in group.asked)]
            yield from (scored or {}).items()
        if rows and not self.shares:
            groups = _apart(rows)
            self._try_padding(max(rows, key=lambda row: len(row.inputs)))
        for batch in self._batches(groups, masked=bool(self.shares)):
            yield from self._of_batch(batch)

    def _rows(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[_Row]:
        rows: dict[tuple[int, ...], _Row] = {}
        for number, (context, continuation) in enumerate(requests):
            inputs = tuple((context + continuation)[-(self.max_length + 1) : -1])
            row = rows.setdefault(inputs, _Row(inputs=inputs))
            row.asked.append(_Asked(number=number, first=len(inputs) - len(continuation), tokens=continuation))
        return list(rows.values())

    def _tried_on(self, groups: Sequence[_Group]) -> dict[int, Score] | None:
        """Score the longest group and that with the longest row both ways; what was tried of as long ones is not tried again.

        Returns:
            The scores of what was tried, by number of the request; None: the model gives others row by row.
        """
        if self.shares is None and not self._may_share(groups[0].rows[0]):
            return None
        several = [group for group in groups if len(group.rows) > 1]
        longest = {
            "sequence": max(several, key=lambda group: group.length, default=None),
            "row": max(groups, key=lambda group: group.longest),
        }
        sizes = {kind: 0 if group is None else group.length if kind == "sequence" else group.longest for kind, group in longest.items()}
        found = {id(group): group for kind, group in longest.items() if group is not None and sizes[kind] > self._tried[kind]}
        if not found:
            return {}
        scores = self._equal_apart(
            list(found.values()), min((row for group in groups for row in group.rows), key=lambda row: len(row.inputs))
        )
        if scores is None:
            log.warning("%s gives other scores of several sequences in one: %s", type(self.model).__name__, APART)
            return None
        self._tried = {kind: max(tried, sizes[kind]) for kind, tried in self._tried.items()}
        return scores

    def _may_share(self, row: _Row) -> bool:
        """Whether the model takes positions and a mask, and has plain keys and values, of one window at most."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        kind, config = type(self.model).__name__, self.model.config.get_text_config()
        if not {"attention_mask", "position_ids"} <= set(inspect.signature(self.model.forward).parameters):
            log.info("%s takes no positions: %s", kind, APART)
            return False
        if _rotary_kinds(getattr(config, "rope_parameters", None)) & set(OF_ALL_POSITIONS):
            log.info("%s has rotary embeddings that depend on the longest sequence of a pass: %s", kind, APART)
            return False
        try:
            probe = self.model(torch.tensor([row.inputs[:CUT]], device=self.model.device), use_cache=True)
        except REFUSALS:  # as of xLSTM at some sizes
            probe = None
        cache: Any = getattr(probe, "past_key_values", None)
        if type(cache) is not DynamicCache or not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            log.info("%s keeps more than keys and values: %s", kind, APART)
            return False
        windows = {layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers}
        short = {window for window in windows if window is not None and window < self.max_length}
        if short:
            (self._window, *others), types = short, set(getattr(config, "layer_types", None) or ())
            self._kinds = types if len(windows) > 1 else set()
            if others or not types <= {FULL, SLIDING} or (len(windows) > 1 and len(types) < 2):
                log.info("%s has other windows than one that slides: %s", kind, APART)
                return False
        return True

    def _equal_apart(self, groups: list[_Group], shortest: _Row) -> dict[int, Score] | None:
        """The scores of some groups, if the first, the longest and the last row of each have those that they have by themselves.

        Args:
            shortest: a row that is padded next to them.
        """
        few = {
            id(row): row for group in groups for row in (group.rows[0], max(group.rows, key=lambda row: len(row.inputs)), group.rows[-1])
        }
        apart = dict(one for row in few.values() for one in self._of_batch(_Batch(_apart([row]), masked=False)))
        try:
            padded = _apart([shortest])
            ours = {key: score for group in groups for key, score in self._of_batch(_Batch([*padded, group], masked=True))}
        except REFUSALS as error:
            log.info("%s takes no mask for several sequences in one (%s)", type(self.model).__name__, error)
            return None
        if not all(self._close(ours[number].likelihood, score.likelihood) for number, score in apart.items()):
            return None
        return {one.number: ours[one.number] for group in groups for one, _ in group.asked}

    def _try_padding(self, row: _Row) -> None:
        """Score rows of different lengths together only where what follows changes no prediction, as it does where all attend to all."""
        if len(row.inputs) <= max(CUT, self._tried_alone):
            return
        self._tried_alone = len(row.inputs)
        whole, place = torch.tensor([row.inputs]), len(row.inputs) - CUT - 1
        found = (self._logits(tokens, torch.tensor([0]), torch.tensor([place])) for tokens in (whole, whole[:, :-CUT]))
        ours, alone = (logits[0].float().log_softmax(dim=-1) for logits in found)
        likely = alone.topk(min(LIKELY, len(alone))).indices
        if not all(self._close(*pair) for pair in zip(ours[likely].tolist(), alone[likely].tolist(), strict=True)):
            log.info("%s predicts otherwise where other tokens follow: only rows as long are scored together", type(self.model).__name__)
            self._padding = 0

    def _close(self, ours: float, alone: float) -> bool:
        absolute, relative = TOLERANCES.get(self.model.dtype, OF_HALVES)
        return abs(ours - alone) <= absolute + relative * abs(alone)

    def _batches(self, groups: Sequence[_Group], *, masked: bool) -> Iterator[_Batch]:
        """Groups of similar lengths, longest first, split where they are too many for one pass."""
        batch: list[_Group] = []
        for group in sorted(groups, key=lambda group: -group.length):
            extended = _Batch([*batch, group], masked)
            if batch and (extended.padding > self._padding or not self._fits(extended)):
                yield _Batch(batch, masked)
                batch = []
            batch.append(group)
        if batch:
            yield _Batch(batch, masked)

    def _parts(self, group: _Group) -> Iterator[_Group]:
        """A group in parts that are no longer than what the model takes, and fit one pass."""
        rows: list[_Row] = []
        for row in group.rows:
            extended = _Group(rows=[*rows, row], shared=group.shared)
            if rows and (extended.length > self.max_length or not self._fits(_Batch([extended], masked=True))):
                yield _of(rows, group.shared)
                rows = []
            rows.append(row)
        yield _of(rows, group.shared)

    def _fits(self, batch: _Batch) -> bool:
        read = sum(len(places) for group in batch.groups for _, places in group.asked)
        return len(batch.groups) * batch.length <= self.tokens_at_once and read * self.vocabulary <= LOGITS_AT_ONCE

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
        options: dict[str, Any] = {}
        if batch.masked:
            options = {"attention_mask": self._masks(branches, positions), "position_ids": positions.to(self.model.device)}
        asked = batch.asked
        which = torch.tensor([index for _, index, places in asked for _ in places])
        where = torch.tensor([place for _, _, places in asked for place in places])
        of_each = self._logits(tokens, which, where, **options).split([len(places) for _, _, places in asked])
        for (one, _, _), logits in zip(asked, of_each, strict=True):
            yield one.number, score_of(logits, one.tokens)

    def _logits(self, tokens: torch.Tensor, which: torch.Tensor, where: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits at some places alone, [places, vocabulary]: the output embedding is handed their hidden states.

        Args:
            tokens: [sequences, length], int64. which, where: of each place, the sequence and the position in it. options: of the model.
        """

        def of_places(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not arguments or arguments[0].shape[:2] != tokens.shape:  # called otherwise: all logits are computed
                return None
            return (arguments[0][which, where][None], *arguments[1:])

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(of_places) if head is not None else None
        try:
            logits: torch.Tensor = self.model(tokens.to(self.model.device), use_cache=False, **options).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[0] if logits.shape[:2] == (1, len(where)) else logits[which, where]


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
    return [_of(group.rows, group.shared) for group in groups]


def _of(rows: list[_Row], shared: int) -> _Group:
    """Rows that begin alike as one sequence; one alone shares nothing."""
    return _Group(rows=rows, shared=shared if len(rows) > 1 else 0)


def _rotary_kinds(parameters: Any) -> set[str]:
    """The kinds of rotary embeddings that a configuration names, of all layers or of each kind of them."""
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters[key]) for key in ("rope_type", "type") if key in parameters}
    return own.union(*map(_rotary_kinds, parameters.values()))


def _apart(rows: Sequence[_Row]) -> list[_Group]:
    """Every row as a sequence of its own."""
    return [_Group(rows=[row], shared=0) for row in rows]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
