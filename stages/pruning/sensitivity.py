"""Evidence for an allocation, measured on the dense model before it is pruned, one block in memory at a time.

    outlier_shares       fraction of a block's Wanda scores above a multiple of their mean  # OWL: Yin et al. 2024, arXiv:2310.05175
    spectral_exponents   mean Hill exponent of the spectra of a block's matrices            # AlphaPruning: Lu et al. 2024, arXiv:2410.10912
    sensitivities        expected rise of the loss when a matrix is pruned:

        L(W') - L(W) ~ 1/2 sum_i F_i sum_j (W_ij - W'_ij)² N_j,   F_i = E_t[g_ti²],  N_j = sum_t w_t X_tj²
        w_t = 1 - c + c ||g_t||² / E_s||g_s||²

with g_t the gradient of the next-token loss with respect to the matrix's outputs at token t: F is the diagonal of the Fisher information
of the outputs, and N the squared norm of the inputs, in which each token has the weight w_t, 1 on average. K-FAC (Martens & Grosse 2015,
arXiv:1503.05671) takes inputs and gradients as independent; then w_t is 1 and N_j = ||X_j||². They are not: the first token of a window
has enormous activations in many models and hardly a gradient. But gradients are those of the dense model, and miss what happens where
pruning changes a token on which the attention of all others depends. c, the gradient weight, interpolates. As in Wanda, inputs are
taken as uncorrelated.
"""

import math
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
from stages.pruning.experts import products_of
from stages.pruning.inputs import Inputs
from stages.pruning.observer import observe
from stages.pruning.patterns import ComparisonGroup, Unstructured
from stages.pruning.scores.wanda import wanda
from stages.pruning.statistics import SquaredNorm
from stages.streaming.architecture import Layer, Matrix
from stages.streaming.calls import block_outputs, run_block
from stages.streaming.decoder import TOKENS_AT_ONCE, Decoder
from stages.streaming.stream import Stream, read_ahead


@dataclass(kw_only=True, slots=True)
class Sensitivity:
    """How much the loss depends on one matrix.

    curve: expected rise of the loss at each sparsity of a grid, up to a factor that all matrices share, 0 or more.
    fisher: [rows], float32, 0 or more, the Fisher estimate of each output: its mean squared gradient over tokens, at least the floor.
    """

    curve: list[float]
    fisher: torch.Tensor


@torch.no_grad()
def outlier_shares(stream: Stream, multiple: float) -> list[float]:
    """Measure OWL's evidence on the inputs of the dense model.

    Args:
        stream: before the first block; advanced through all blocks. multiple: see allocation.outlier_share.

    Returns:
        For each block the fraction of its Wanda scores that are outliers, 0 to 1.

    Raises:
        PruningError: activations or a score are not finite; names the block.
    """
    shares = []
    for index, block in _dense_blocks(stream.decoder, range(len(stream.decoder.blocks))):
        norms = _squared_norms(_observed_pass(stream, index, block), stream.all_windows)
        scores = _wanda_scores(stream.decoder, block, stream.decoder.matrices[index], norms)
        with PruningError.naming(f"block {index}"):
            shares.append(outlier_share(torch.cat([score.flatten() for score in scores]), multiple))
    return shares


@torch.no_grad()
def spectral_exponents(decoder: Decoder) -> list[float]:
    """Measure AlphaPruning's evidence.

    Returns:
        For each block the mean over its matrices of allocation.hill_exponent, above 1.

    Raises:
        PruningError: a spectrum has no tail, or a weight is not finite, see allocation.hill_exponent; names the layer.
    """
    means = []
    for index, block in _dense_blocks(decoder, range(len(decoder.blocks))):
        exponents = []
        for matrix in decoder.matrices[index]:
            with PruningError.naming(f"layer {matrix.name}"):
                exponents.append(hill_exponent(decoder.stored(matrix, block)))
        means.append(sum(exponents) / len(exponents))
    return means


def sensitivities(
    stream: Stream, grid: list[float], comparison_group: ComparisonGroup, *, gradient_weights: list[float], fisher_floor: float
) -> dict[float, dict[str, Sensitivity]]:
    """Estimate the rise of the loss when each matrix alone is pruned to each sparsity of a grid.

    The windows run forward block by block, then backward block by block; each block runs again for its gradients.

    Args:
        stream: a few windows, before the first block; changed.
        grid: fractions of zeros, ascending, 0 to 1. comparison_group: see patterns.ComparisonGroup.
        gradient_weights: values of c, see the head of this file, 0 to 1.
        fisher_floor: lower bound of what the loss of a whole output would cost, see floored, as a fraction of its matrix's mean, 0 to 1.
            Gradients are small behind a saturated softmax; the estimate alone would rate the weights that keep it saturated as free to
            prune.

    Returns:
        Gradient weight -> matrix name -> its sensitivity.
        Experts without routed tokens and matrices whose gradients are all zero are missing.

    Raises:
        PruningError: activations, gradients or scores are not finite; names the block or the layer.
    """
    decoder, count = stream.decoder, len(stream.decoder.blocks)
    block_inputs = stream.host_buffer((count, *stream.hidden.shape), stream.hidden.dtype)
    with torch.no_grad():
        for index, block in _dense_blocks(decoder, range(count)):
            block_inputs[index] = stream.hidden
            stream.advance(index, block)
        gradient = _loss_gradient(stream)
        results: dict[float, dict[str, Sensitivity]] = {weight: {} for weight in gradient_weights}
        for index, block in _dense_blocks(decoder, range(count - 1, -1, -1)):
            stream.hidden = block_inputs[index]
            products = _backward(stream, index, block, gradient)
            known = [matrix for matrix in decoder.matrices[index] if matrix.layer in products]
            for weight, matrix in ((weight, matrix) for matrix in known for weight in gradient_weights):
                of_layer = products[matrix.layer]
                fisher = matrix.rows_of(of_layer.fisher)
                if not fisher.any():
                    continue
                squared = wanda(decoder.stored(matrix, block), of_layer.weighted_norm(weight) / stream.all_windows).square_()
                fisher = floored(fisher, squared.sum(dim=1), fisher_floor)
                with PruningError.naming(f"layer {matrix.name}"):
                    curve = removal_curve(squared.mul_(fisher[:, None]), grid=grid, comparison_group=comparison_group)
                results[weight][matrix.name] = Sensitivity(curve=curve, fisher=fisher.cpu())
    return results


def floored(fisher: torch.Tensor, energy: torch.Tensor, floor: float) -> torch.Tensor:
    """Raise the Fisher estimates so that F_i * energy_i, what the loss of a whole output costs, is at least `floor` of its mean.

    The product, unlike the estimate, is the same whatever the scale at which an output is written. Outputs of which neither is above 0,
    such as those of a neuron that is removed already, get the least of the others' estimates: what their weights cost is 0 all the same.

    Args:
        fisher: [rows], 0 or more, one of them above 0. energy: [rows], the sum of an output's squared scores, 0 or more.

    Returns:
        [rows], above 0.
    """
    least = floor * (fisher * energy).mean() / energy
    raised = torch.where(least.isfinite(), torch.maximum(fisher, least), fisher)
    return torch.where(raised > 0, raised, raised[raised > 0].min())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to allocate zeros.

    patterns: matrix name -> the pattern of its mask. row_costs: see plan.Plan.
    """

    patterns: dict[str, Unstructured]
    row_costs: dict[str, torch.Tensor]


@torch.no_grad()
def pruned_losses(stream: Stream, held_out: list[Stream], candidates: list[Candidate]) -> list[float]:
    """Measure on windows held out what the loss is after pruning by each candidate, by Wanda on the inputs of the dense model.

    Wanda stands for every method: it takes one pass, and tells allocations apart as they do. Every block is read once.

    Args:
        stream: windows to calibrate on, before the first block; advanced through all blocks.
        held_out: for each candidate a stream of the windows held out, likewise.

    Returns:
        For each candidate the mean next-token loss, nats per token.

    Raises:
        PruningError: activations, scores or a loss are not finite; names the block or the layer.
    """
    for index, block in _dense_blocks(stream.decoder, range(len(stream.decoder.blocks))):
        norms = _squared_norms(_observed_pass(stream, index, block), stream.all_windows)
        matrices = [matrix for matrix in stream.decoder.matrices[index] if matrix.layer in norms]
        dense = [matrix.of(block).clone() for matrix in matrices]
        for states, candidate in zip(held_out, candidates, strict=True):
            for matrix, weights in zip(matrices, dense, strict=True):
                scores = wanda(stream.decoder.stored(matrix, block), norms[matrix.layer])
                if matrix.name in candidate.row_costs:
                    scores *= candidate.row_costs[matrix.name].to(scores.device).sqrt()[:, None]
                with PruningError.naming(f"layer {matrix.name}"):
                    mask = candidate.patterns[matrix.name].mask(scores)
                matrix.of(block).copy_(weights.masked_fill(~mask, 0))
            states.advance(index, block)
            for matrix, weights in zip(matrices, dense, strict=True):
                matrix.of(block).copy_(weights)
    losses = [next_token_loss(states) for states in held_out]
    if not all(math.isfinite(loss) for loss in losses):
        raise PruningError("found NaN or infinity as the loss of the pruned model on the windows held out, wanted finite logits")
    return losses


def next_token_loss(stream: Stream) -> float:
    """The mean loss of the next token over the windows of all processes, nats, from the last block's outputs."""
    total = torch.zeros(2, dtype=torch.float64)
    with stream.decoder.after_blocks():
        for hidden, tokens in zip(stream.hidden, stream.windows, strict=True):
            for start in range(0, len(tokens) - 1, TOKENS_AT_ONCE):
                positions = slice(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1))
                logits = stream.decoder.logits(hidden[None, positions].to(stream.decoder.device))[0].float()
                loss = cross_entropy(logits, tokens[1:][positions].to(logits.device), reduction="sum")
                total += torch.tensor([loss.item(), len(logits)], dtype=torch.float64)
    loss_sum, count = distributed.all_reduce(total).tolist()
    return loss_sum / count


def _dense_blocks(decoder: Decoder, order: range) -> Iterator[tuple[int, nn.Module]]:
    """Yield each block's index and the block, loaded with its weights."""
    with read_ahead(decoder, order) as blocks:
        for index, tensors in zip(order, blocks, strict=True):
            with decoder.loaded(index, tensors) as block:
                yield index, block


def _observed_pass(stream: Stream, index: int, block: nn.Module) -> list[Inputs[SquaredNorm]]:
    """Run all windows through a dense block, and return every distinct input of its layers."""
    observer = observe(stream, block, stream.decoder.layers(index), SquaredNorm)
    for windows, hidden, call in stream.parts(index):
        stream.put(index, windows, observer.run(hidden, partial(block_outputs, block, call=call)), call)
    stream.require_finite(index)
    return observer.finish(None)


def _squared_norms(inputs: list[Inputs[SquaredNorm]], windows: int) -> dict[Layer, torch.Tensor]:
    """Squared norm of each layer's inputs, [columns]: sum over tokens / number of windows; experts without tokens are missing."""
    norms: dict[Layer, torch.Tensor] = {}
    for distinct in inputs:
        norm = distinct.statistic.value * distinct.statistic.windows / windows
        norms.update(dict.fromkeys(distinct.layers, norm))
    return norms


def _wanda_scores(decoder: Decoder, block: nn.Module, matrices: Iterable[Matrix], norms: dict[Layer, torch.Tensor]) -> list[torch.Tensor]:
    """Wanda scores of the matrices whose inputs have norms, [rows, columns] each."""
    return [wanda(decoder.stored(matrix, block), norms[matrix.layer]) for matrix in matrices if matrix.layer in norms]


def _loss_gradient(stream: Stream) -> torch.Tensor:
    """Gradient of the next-token loss, summed over tokens, with respect to the last block's output, in its shape."""
    gradient = stream.host_buffer(tuple(stream.hidden.shape), stream.hidden.dtype)
    with stream.decoder.after_blocks(), torch.enable_grad():
        for hidden, tokens, window_gradient in zip(stream.hidden, stream.windows, gradient, strict=True):
            window_gradient[-1] = 0  # the last token has no next token
            for start in range(0, len(tokens) - 1, TOKENS_AT_ONCE):  # logits are large
                positions = slice(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1))
                leaf = hidden[None, positions].to(stream.decoder.device).requires_grad_()
                logits, targets = stream.decoder.logits(leaf)[0].float(), tokens[1:][positions]
                (by_hidden,) = torch.autograd.grad(cross_entropy(logits, targets.to(logits.device), reduction="sum"), leaf)
                window_gradient[positions] = by_hidden[0]
    return gradient


def _backward(stream: Stream, index: int, block: nn.Module, gradient: torch.Tensor) -> dict[Layer, "_Products"]:
    """Run a block again and propagate the gradient through it.

    Args:
        stream: before the block. gradient: with respect to the block's output; changed in place to that with respect to its input.

    Returns:
        For each layer that has gradients, what its tokens add up to.
    """
    layers, products = stream.decoder.layers(index), dict[Layer, _Products]()
    for matrix in stream.decoder.matrices[index]:
        if matrix.layer not in products:
            products[matrix.layer] = _Products(_layer_outputs(matrix, block), matrix.shape[1], stream.decoder.device)
    with _products(block, layers, lambda layer, inputs, output: products[layer].watch(inputs, output)):
        for windows, windows_hidden, call in stream.parts(index):
            with torch.enable_grad():
                hidden = windows_hidden.detach().requires_grad_()
                output = run_block(block, hidden, call)
                (by_input,) = torch.autograd.grad(output, hidden, gradient[windows].to(output))
            gradient[windows] = by_input
    if not torch.isfinite(gradient).all():
        raise PruningError(f"block {index}: found NaN or infinity in the gradients, wanted finite ones")
    for layer in layers:
        products[layer].all_reduce()
    return {layer: layer_products for layer, layer_products in products.items() if layer_products.squared_gradients.any()}


class _Products:
    """Sums over the tokens that one layer reads.

    squared_gradients: of each output, [outputs], float32. squared_inputs: of each input, [columns], float32; by_gradients: the same, each
    token weighted by the squared norm of its gradient. tokens: number of tokens, float32.
    """

    def __init__(self, outputs: int, columns: int, device: torch.device) -> None:
        self.squared_gradients = torch.zeros(outputs, device=device)
        self.squared_inputs, self.by_gradients = torch.zeros(2, columns, device=device)
        self.tokens = torch.zeros((), device=device)

    def watch(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add the tokens of a product, [..., columns] and [..., outputs], once the gradient has come back; without a gradient, as where
        the outputs only choose what attention reads, they are not counted.
        """
        if not output.requires_grad:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1])

        def add(by_output: torch.Tensor) -> None:
            gradients, squares = by_output.reshape(-1, by_output.shape[-1]).float().square(), rows.float().square()
            self.squared_gradients += gradients.sum(dim=0)
            self.squared_inputs += squares.sum(dim=0)
            self.by_gradients += gradients.sum(dim=1) @ squares
            self.tokens += len(rows)

        output.register_hook(add)

    def all_reduce(self) -> None:
        for total in (self.squared_gradients, self.squared_inputs, self.by_gradients, self.tokens):
            distributed.all_reduce(total)

    @property
    def fisher(self) -> torch.Tensor:
        """The Fisher estimate of the outputs, [outputs]."""
        return self.squared_gradients / self.tokens

    def weighted_norm(self, gradient_weight: float) -> torch.Tensor:
        """The weighted sum of squared inputs, [columns], see the head of this file; the mean of the weights over the tokens is 1."""
        by_gradients = self.by_gradients * (self.tokens / self.squared_gradients.sum())
        return torch.lerp(self.squared_inputs, by_gradients, gradient_weight)


def _layer_outputs(matrix: Matrix, block: nn.Module) -> int:
    """Number of outputs of a matrix's layer: a fused gate and up projection has those of both matrices."""
    shape = block.get_parameter(matrix.parameter_slice.name).shape[0 if matrix.parameter_slice.expert is None else 1 :]
    return shape[1 if matrix.layer.transposed else 0]


@contextmanager
def _products(block: nn.Module, layers: list[Layer], receive: Callable[[Layer, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `receive` with the input and the output of every layer's product while the block runs."""
    others = []
    with ExitStack() as stack:
        for layer in layers:
            if layer.is_module_of(block):
                module = block.get_submodule(layer.module)
                hook = module.register_forward_hook(lambda _, inputs, output, layer=layer: receive(layer, inputs[0], output))
                stack.callback(hook.remove)
            else:
                others.append(layer)
        if others:
            stack.enter_context(products_of(block, others, receive))
        yield
