"""Inputs of layers: a statistic and a sample of tokens of each distinct input. Layers that read the same tensor have both in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

import torch

from stages.errors import PruningError
from stages.pruning.statistics import Statistic
from stages.streaming.architecture import Layer

S = TypeVar("S", bound=Statistic)


class CalibratedOn(StrEnum):
    """The tokens of a statistic: those that the layer reads, or, for an expert with few routed tokens, a sample of all tokens."""

    ITS_TOKENS = "its tokens"
    ALL_TOKENS = "all tokens"


@dataclass(kw_only=True, slots=True)
class Inputs(Generic[S]):
    """One distinct input.

    layers: the layers that read it, in the order in which they first do so; after Observer.finish in the order of the observed layers.
    statistic: over the tokens of all processes. sample: tensors [tokens, columns], compute dtype, of this process's tokens.
    tokens: number of tokens that the layers read, over all processes.
    """

    layers: list[Layer]
    statistic: S
    sample: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    calibrated_on: CalibratedOn = CalibratedOn.ITS_TOKENS

    def sampled(self) -> torch.Tensor:
        """The sample as one tensor, [tokens, columns], float32."""
        return torch.cat(self.sample).float()

    def reorder(self, order: torch.Tensor) -> None:
        """Reorder the columns: column `order[k]` becomes the k-th; order: [columns], int64."""
        self.statistic.reorder(order)
        self.sample = [piece[:, order] for piece in self.sample]


class EvenSample:
    """Every stride-th token of the calibration set; the micro-batch does not matter.

    Args:
        stride: tokens. first_token: index of this process's first token among those of all processes.
    """

    def __init__(self, stride: int, first_token: int) -> None:
        self.stride, self.first_token = stride, first_token

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copy the sampled tokens of a micro-batch, [..., tokens, columns], to [sampled, columns]."""
        return tokens.detach().reshape(-1, tokens.shape[-1])[-self.first_token % self.stride :: self.stride].clone()

    def advance(self, tokens: int) -> None:
        """Move on to the next micro-batch, which begins `tokens` tokens later."""
        self.first_token += tokens


def by_window(layer: Layer, rows: torch.Tensor, windows: int) -> torch.Tensor:
    """View the rows of inputs that a layer reads of some windows, [rows, columns], as [windows, rows of each, columns].

    Raises:
        PruningError: they cannot be as many for each window; names the layer.
    """
    if len(rows) % windows:
        raise PruningError(f"layer {layer.name}: found {len(rows)} rows of inputs, wanted as many for each of {windows} windows")
    return rows.view(windows, -1, rows.shape[-1])


class Recorder(Generic[S]):
    """The statistic and the sample of every distinct input.

    Args:
        statistic: makes an empty statistic from a number of columns and a device.
        sample: picks tokens of linear layers. expert_tokens: number of tokens sampled of an expert, from its first on.
    """

    def __init__(self, statistic: Callable[[int, torch.device], S], sample: EvenSample, expert_tokens: int) -> None:
        self.statistic, self.sample, self.expert_tokens = statistic, sample, expert_tokens
        self.inputs: dict[Layer, Inputs[S]] = {}
        self.latest: Layer | None = None  # the layer that read last in the current micro-batch
        self._batch = (0, 0)
        self._read: dict[tuple[int, ...], tuple[Inputs[S] | None, torch.Tensor]] = {}  # None: of a layer that read others, too
        self._began: dict[Layer, tuple[int, ...]] = {}  # the first that each layer read, of those that are new in this micro-batch

    def begin(self, windows: int, tokens: int) -> None:
        """Begin a micro-batch of `windows` windows of `tokens` tokens each."""
        self._batch, self.latest = (windows, tokens), None

    def end(self) -> None:
        """End the micro-batch."""
        self.sample.advance(self._batch[0] * self._batch[1])
        self._read.clear()
        self._began.clear()

    @torch.no_grad()
    def add_windows(self, layer: Layer, tensor: torch.Tensor) -> None:
        """Record the input of a linear layer, [..., columns], as many rows for each window of the micro-batch; one for each token mostly.

        Raises:
            PruningError: see by_window.
        """
        inputs = self._first_read_by(layer, tensor)
        if inputs is not None:
            self._add(inputs, layer, tensor)

    def _add(self, inputs: Inputs[S], layer: Layer, tensor: torch.Tensor) -> None:
        rows = tensor.reshape(-1, tensor.shape[-1])
        inputs.statistic.add(by_window(layer, rows, self._batch[0]))
        inputs.sample.append(self.sample.of(rows))
        inputs.tokens += len(rows)

    @torch.no_grad()
    def add_tokens(self, layer: Layer, tensor: torch.Tensor) -> None:
        """Record the tokens that an expert reads, [..., columns].

        Matrices of an expert that read the same have a statistic each: which experts read any tokens differs between processes.
        """
        self.latest = layer
        if layer not in self.inputs:
            self.inputs[layer] = Inputs(layers=[layer], statistic=self.statistic(tensor.shape[-1], tensor.device))
        inputs = self.inputs[layer]
        rows = tensor.reshape(-1, tensor.shape[-1])
        inputs.statistic.add(rows[None])
        inputs.sample.append(rows[: max(0, self.expert_tokens - sum(map(len, inputs.sample)))].clone())
        inputs.tokens += len(rows)

    def _first_read_by(self, layer: Layer, tensor: torch.Tensor) -> Inputs[S] | None:
        """The layer's inputs if it was the first to read them; None if another layer records them."""
        self.latest = layer
        key = (tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor.stride(-1), tensor._version)
        if layer not in self.inputs:
            shared = self._read[key][0] if key in self._read else None
            if shared is None:
                shared = Inputs(layers=[], statistic=self.statistic(tensor.shape[-1], tensor.device))
                self._read[key] = shared, tensor  # which is held, so that no other gets its address
            self.inputs[layer], self._began[layer] = shared, key
            shared.layers.append(layer)
        elif self._began.get(layer, key) != key:
            self._part(layer)
        return self.inputs[layer] if self.records(layer) else None

    def _part(self, layer: Layer) -> None:
        """Give a layer that reads another tensor in the same micro-batch inputs of its own, of which the first tensor is a part."""
        inputs, key = self.inputs[layer], self._began.pop(layer)
        tensor = self._read[key][1]
        if inputs.layers == [layer]:
            self._read[key] = None, tensor  # a layer that reads it from now on does not have these in common
            return
        inputs.layers.remove(layer)
        self.inputs[layer] = Inputs(layers=[layer], statistic=self.statistic(tensor.shape[-1], tensor.device))
        self._add(self.inputs[layer], layer, tensor)

    def records(self, layer: Layer) -> bool:
        """Whether a layer was the first to read its inputs."""
        return layer in self.inputs and self.inputs[layer].layers[0] == layer

    def forget(self, layer: Layer) -> None:
        """Drop the inputs of a layer."""
        if layer in self.inputs:
            self.inputs.pop(layer).layers.remove(layer)

    def ensure(self, layer: Layer, weight: torch.Tensor) -> Inputs[S]:
        """The inputs of a layer with this weight; empty if it read nothing in this process."""
        if layer not in self.inputs:
            columns = weight.shape[-2 if layer.transposed else -1]
            statistic = self.statistic(columns, weight.device)
            self.inputs[layer] = Inputs(layers=[layer], statistic=statistic, sample=[weight.new_empty(0, columns)])
        return self.inputs[layer]
