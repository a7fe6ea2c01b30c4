"""The block loop: one decoder block in memory at a time.

Read a block's tensors, run the windows through it collecting statistics of every layer's input, prune all its matrices, run
the windows again through the pruned block for the next one's inputs: the order of the published Wanda and SparseGPT.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.checkpoint.delta import Change
from stages.errors import PruningError
from stages.pruning.architecture import Call, Decoder, run_block
from stages.pruning.method import PruneMatrix
from stages.pruning.patterns import Pattern
from stages.pruning.statistics import Statistic

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}


@dataclass(kw_only=True, slots=True)
class PrunedBlock:
    """One block's outcome.

    changes: tensor name -> what happened to it, on the CPU.
    errors: tensor name -> ||(W - W') X||_F / ||W X||_F on a sample of the calibration tokens.
    """

    index: int
    changes: dict[str, Change]
    errors: dict[str, float]


def micro_batch(windows: torch.Tensor, device: torch.device, asked: int | None) -> int:
    """Windows per forward pass: as asked, or by the kind of device, so that one kind always computes the same."""
    return asked or max(1, TOKENS_PER_PASS[device.type] // windows.shape[1])


class _Inputs:
    """What the linear layers of a block read: a statistic and a sample of tokens for each distinct input.

    Layers that are handed the same tensor form a group, found in the first forward pass; only its first layer is watched
    after that.
    """

    def __init__(self, block: nn.Module, names: list[str], statistic: type[Statistic], stride: int, device: torch.device) -> None:
        self.statistic, self.stride, self.device = statistic, stride, device
        self.leader: dict[str, str] = {}
        self.statistics: dict[str, Statistic] = {}
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.first_token = 0
        self._seen: list[tuple[torch.Tensor, str]] = []
        modules = dict(block.named_modules())
        self._hooks = {name: modules[name].register_forward_pre_hook(self._watch(name)) for name in names}

    def _watch(self, name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            if name not in self.leader:
                self.leader[name] = next((leader for seen, leader in self._seen if seen is inputs), name)
                self._seen.append((inputs, name))
            if self.leader[name] == name:
                self._take(name, inputs)

        return hook

    def _take(self, name: str, inputs: torch.Tensor) -> None:
        columns = inputs.shape[-1]
        if name not in self.statistics:
            self.statistics[name] = self.statistic(columns, self.device)
            self.samples[name] = []
        self.statistics[name].add(inputs)
        tokens = inputs.reshape(-1, columns)
        self.samples[name].append(tokens[-self.first_token % self.stride :: self.stride].clone())

    def next_batch(self, tokens: int) -> None:
        """Called after each forward pass of `tokens` tokens."""
        self.first_token += tokens
        self._seen.clear()
        for name, leader in self.leader.items():
            if leader != name and name in self._hooks:
                self._hooks.pop(name).remove()

    def of(self, name: str, tensor: str) -> tuple[Statistic, torch.Tensor]:
        """The statistic of the inputs of the layer `name`, and the sampled ones, [tokens, columns]; errors say `tensor`.

        Raises:
            PruningError: no token ever reached the layer, or the inputs are not finite.
        """
        if name not in self.leader:
            raise PruningError(f"layer {tensor}: no calibration token reached it")
        leader = self.leader[name]
        sample = torch.cat(self.samples[leader]).float()
        if not torch.isfinite(sample).all():
            raise PruningError(f"layer {tensor}: found NaN or infinity in its inputs, wanted finite activations")
        return self.statistics[leader], sample

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one is other or not isinstance(one, (int, float, str, bool)))


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> float:
    """||(W - W') X||_F / ||W X||_F; 0 where W X is 0 and nothing changed.

    Args:
        weight, pruned: [rows, columns], float32.
        inputs: [tokens, columns], float32.
    """
    lost = (inputs @ (weight - pruned).T).double().norm().item()
    total = (inputs @ weight.T).double().norm().item()
    return lost / total if total > 0 else float(lost > 0)


@torch.no_grad()
def prune_blocks(
    decoder: Decoder,
    windows: torch.Tensor,
    prune_matrix: PruneMatrix,
    patterns: dict[str, Pattern],
    *,
    batch: int,
    error_tokens: int,
) -> Iterator[PrunedBlock]:
    """Prune block after block.

    Args:
        windows: [windows, tokens], int64.
        patterns: tensor name -> the pattern that its mask must have.
        batch: windows per forward pass.
        error_tokens: about how many calibration tokens the relative error is measured on, evenly spread.

    Yields:
        One PrunedBlock for each block, as soon as it is done.

    Raises:
        PruningError: naming the layer: scores that are not finite, a Gram matrix that does not factor, no tokens.
    """
    starts = range(0, len(windows), batch)
    stride = max(1, windows.numel() // error_tokens)
    calls: dict[int, list[Call]] = {}
    hidden: torch.Tensor | None = None
    with decoder.before_blocks():
        for start in starts:
            of_batch = decoder.calls(windows[start : start + batch])
            embedded = of_batch[0].hidden
            if hidden is None:
                hidden = torch.empty((len(windows), *embedded.shape[1:]), dtype=embedded.dtype)
            hidden[start : start + batch] = embedded
            for call in of_batch:
                call.hidden = embedded[:0]
            known = calls.setdefault(len(embedded), of_batch)
            if not all(
                same(call.arguments, of.arguments) and same(call.keywords, of.keywords) for call, of in zip(of_batch, known, strict=True)
            ):
                raise PruningError(
                    f"{decoder.name}: what its blocks receive differs from window to window; this architecture is not supported"
                )
    assert hidden is not None

    for index in range(len(decoder.blocks)):
        with decoder.loaded(index) as (block, stored):
            names = decoder.matrices(index)
            inputs = _Inputs(block, list(names), prune_matrix.statistic, stride, decoder.device)
            for start in starts:
                part = hidden[start : start + batch].to(decoder.device)
                run_block(block, part, calls[len(part)][index])
                inputs.next_batch(part.shape[0] * part.shape[1])
            inputs.close()
            changes, errors = {}, {}
            for module, name in names.items():
                statistic, sample = inputs.of(module, name)
                weight = stored[module].to(decoder.device).float()
                try:
                    mask, values = prune_matrix(weight, statistic, patterns[name])
                except (ArithmeticError, ValueError) as error:
                    raise PruningError(f"layer {name}: {error}") from error
                change = Change(mask=mask.cpu())
                if values is not None:
                    change.values = values.cpu()[change.mask].to(stored[module].dtype)
                pruned = change.apply(stored[module])
                decoder.set_weight(block, module, pruned)
                changes[name] = change
                errors[name] = relative_error(weight, pruned.to(weight), sample)
            for start in starts:
                part = hidden[start : start + batch].to(decoder.device)
                hidden[start : start + batch] = run_block(block, part, calls[len(part)][index])
        yield PrunedBlock(index=index, changes=changes, errors=errors)
