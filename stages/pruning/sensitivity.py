"""What the dense model tells of its matrices before any is pruned for good: evidence for an allocation, one block in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.allocation import hill_exponent, outlier_share, removal_curve
from stages.pruning.observer import ExpertProducts, Observer, watch
from stages.pruning.scores.wanda import wanda
from stages.pruning.statistics import SquaredNorm
from stages.streaming.architecture import Layer, Matrix
from stages.streaming.calls import run_block
from stages.streaming.decoder import TOKENS_AT_ONCE, Decoder
from stages.streaming.stream import Stream, read_ahead


@dataclass(kw_only=True, slots=True)
class Sensitivity:
    """How the loss feels errors of one matrix.

    curve: expected rise of the loss, up to a common factor, at each sparsity of the grid.
    rows: [rows], float32, mean over tokens of the squared gradient of the loss by each output.
    """

    curve: list[float]
    rows: torch.Tensor


@torch.no_grad()
def outlier_shares(stream: Stream, multiple: float) -> list[float]:
    """OWL's evidence: for each block the share of Wanda scores above `multiple` times their mean, on dense inputs.

    Raises:
        PruningError: a score is not finite; names the block.
    """
    shares = []
    for index, block in _dense_blocks(stream.decoder, range(len(stream.decoder.blocks))):
        norms = _advance_and_see(stream, index, block)
        scores = _wanda_scores(stream.decoder, block, stream.decoder.matrices[index], norms)
        with PruningError.naming(f"block {index}"):
            shares.append(outlier_share(torch.cat([score.flatten() for score in scores.values()]), multiple))
    return shares


@torch.no_grad()
def spectral_exponents(decoder: Decoder) -> list[float]:
    """AlphaPruning's evidence: for each block the mean over its matrices of the Hill exponent of their spectra.

    Raises:
        PruningError: a spectrum without a tail; names the layer.
    """
    exponents = []
    for index, block in _dense_blocks(decoder, range(len(decoder.blocks))):
        found = []
        for matrix in decoder.matrices[index]:
            with PruningError.naming(f"layer {matrix.name}"):
                found.append(hill_exponent(decoder.stored(matrix, block)))
        exponents.append(sum(found) / len(found))
    return exponents


def sensitivities(stream: Stream, grid: list[float], comparison_group: str, floor: float) -> dict[str, Sensitivity]:
    """Our own evidence: what pruning each matrix is expected to add to the loss, by a diagonal second-order estimate.

        L(W') - L(W) ~ 1/2 sum_i E[g_i²] sum_j (W_ij - W'_ij)² ||X_j||²

    with g the gradient of the next-token loss by the matrix's outputs: the Fisher information of the outputs times the
    expected square of their errors, inputs and gradients taken as independent (as in K-FAC, Martens & Grosse 2015,
    arXiv:1503.05671) and inputs as uncorrelated (as in Wanda).

    The windows run forward block by block, then backward block by block, each block run again for its gradients.

    Args:
        stream: a few windows, before the first block.
        grid: sparsities, ascending. comparison_group: "row" or "matrix", see allocation.removal_curve.
        floor: least E[g_i²], share of its matrix's mean: where a softmax is saturated gradients are small, yet to lose what
            saturates it is dear.

    Returns:
        By the name of the matrix; an expert that no token chose, or whose outputs the loss does not feel, is not there.

    Raises:
        PruningError: activations, gradients or scores that are not finite; names the block or the layer.
    """
    decoder, count = stream.decoder, len(stream.decoder.blocks)
    entered = stream.host_buffer((count, *stream.hidden.shape), stream.hidden.dtype)
    with torch.no_grad():
        for index, block in _dense_blocks(decoder, range(count)):
            entered[index] = stream.hidden
            stream.advance(index, block)
        gradient = _loss_gradient(stream)
        found: dict[str, Sensitivity] = {}
        for index, block in _dense_blocks(decoder, range(count - 1, -1, -1)):
            stream.hidden = entered[index]
            norms, rows, gradient = _backward(stream, index, block, gradient)
            for matrix in decoder.matrices[index]:
                if matrix.layer not in norms:
                    continue
                felt = matrix.own(rows[matrix.layer])
                if not felt.any():
                    continue
                felt = felt.clamp_min(floor * felt.mean())
                squared = wanda(decoder.stored(matrix, block), norms[matrix.layer]).square_()
                with PruningError.naming(f"layer {matrix.name}"):
                    curve = removal_curve(squared.mul_(felt[:, None]), grid=grid, comparison_group=comparison_group)
                found[matrix.name] = Sensitivity(curve=curve, rows=felt.cpu())
    return found


def _dense_blocks(decoder: Decoder, order: range) -> Iterator[tuple[int, nn.Module]]:
    with read_ahead(decoder, order) as blocks:
        for index, tensors in zip(order, blocks, strict=True):
            with decoder.loaded(index, tensors) as block:
                yield index, block


def _advance_and_see(stream: Stream, index: int, block: nn.Module) -> dict[Layer, torch.Tensor]:
    """All windows through a dense block; of each layer's inputs the squared norm, see _squared_norms."""
    observer = watch(stream, block, stream.decoder.layers(index), SquaredNorm)
    for where, hidden, call in stream.parts(index):
        output = observer.run(hidden, partial(run_block, block, call=call), stop=False)
        assert output is not None
        stream.put(where, output)
    stream.require_finite(index)
    observer.finish(None)
    return _squared_norms(observer, stream.all_windows)


def _wanda_scores(
    decoder: Decoder, block: nn.Module, matrices: Iterable[Matrix], norms: dict[Layer, torch.Tensor]
) -> dict[Matrix, torch.Tensor]:
    """Of those matrices whose inputs were seen."""
    seen = [matrix for matrix in matrices if matrix.layer in norms]
    return {matrix: wanda(decoder.stored(matrix, block), norms[matrix.layer]) for matrix in seen}


def _squared_norms(observer: Observer, windows: int) -> dict[Layer, torch.Tensor]:
    """Of each layer's inputs, [columns], summed over its tokens, by window; without experts that no token chose."""
    found = {}
    for inputs, layers in observer.groups():
        assert isinstance(inputs.statistic, SquaredNorm)
        found.update(dict.fromkeys(layers, inputs.statistic.value * inputs.statistic.windows / windows))
    return found


def _loss_gradient(stream: Stream) -> torch.Tensor:
    """Of the next-token loss, summed over tokens, by the last block's output: in the shape of the hidden states."""
    gradient = stream.host_buffer(tuple(stream.hidden.shape), stream.hidden.dtype)
    with stream.decoder.after_blocks(), torch.enable_grad():
        for hidden, tokens, found in zip(stream.hidden, stream.windows, gradient, strict=True):
            found[-1] = 0  # of the last token nobody knows the next
            for start in range(0, len(tokens) - 1, TOKENS_AT_ONCE):  # logits are large
                part = slice(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1))
                at = hidden[None, part].to(stream.decoder.device).requires_grad_()
                logits, targets = stream.decoder.logits(at)[0].float(), tokens[1:][part]
                (by_hidden,) = torch.autograd.grad(cross_entropy(logits, targets.to(logits.device), reduction="sum"), at)
                found[part] = by_hidden[0]
    return gradient


def _backward(
    stream: Stream, index: int, block: nn.Module, gradient: torch.Tensor
) -> tuple[dict[Layer, torch.Tensor], dict[Layer, torch.Tensor], torch.Tensor]:
    """The squared norm of each layer's inputs, its outputs' mean squared gradients over its tokens, the gradient by the block's input."""
    layers = stream.decoder.layers(index)
    observer = watch(stream, block, layers, SquaredNorm)
    matrices, device = stream.decoder.matrices[index], stream.decoder.device
    rows = {matrix.layer: torch.zeros(_outputs_of(matrix, block), device=device) for matrix in matrices}

    def take(layer: Layer, output: torch.Tensor) -> None:
        def add(by_output: torch.Tensor) -> None:
            rows[layer] += by_output.flatten(0, -2).float().square().sum(dim=0)

        output.register_hook(add)

    with _outputs(block, layers, take):
        for where, part, call in stream.parts(index):
            with torch.enable_grad():
                hidden = part.detach().requires_grad_()
                output = observer.run(hidden, partial(run_block, block, call=call), stop=False)
                assert output is not None
                (by_input,) = torch.autograd.grad(output, hidden, gradient[where].to(output))
            gradient[where] = by_input
    if not torch.isfinite(gradient).all():
        raise PruningError(f"block {index}: found NaN or infinity in the gradients, wanted finite ones")
    observer.finish(None)
    counts = {layer: observer.inputs[leader].tokens for layer, leader in observer.leader.items()}
    norms = _squared_norms(observer, stream.all_windows)
    return norms, {layer: distributed.all_reduce(rows[layer]) / counts[layer] for layer in norms}, gradient


def _outputs_of(matrix: Matrix, block: nn.Module) -> int:
    """Of the layer that the matrix is in: it may hold others beside it, as a fused gate and up projection does."""
    shape = block.get_parameter(matrix.parameter_slice.name).shape[0 if matrix.parameter_slice.expert is None else 1 :]
    return shape[1 if matrix.transposed else 0]


@contextmanager
def _outputs(block: nn.Module, layers: list[Layer], take: Callable[[Layer, torch.Tensor], None]) -> Iterator[None]:
    """Hand the output of every layer's product to `take` while the block runs."""
    experts = [layer for layer in layers if layer.expert is not None]
    with ExitStack() as stack:
        for layer in layers:
            if layer.expert is None:
                module = block.get_submodule(layer.module)
                hook = module.register_forward_hook(lambda _, __, output, layer=layer: take(layer, output))
                stack.callback(hook.remove)
        if experts:
            stack.enter_context(ExpertProducts(block, experts, lambda layer, _, output: take(layer, output)))
        yield
