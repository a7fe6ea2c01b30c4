from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning.observer import Observer, even_sample
from stages.pruning.statistics import SquaredNorm
from stages.streaming.architecture import Layer

LAYERS = [Layer(f"{name}.weight", None) for name in ("query", "key", "output")]
HIDDEN = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers that read the block's input, and one that reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.output = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(self.query(hidden) + self.key(hidden))


def observer_of(block: nn.Module, layers=LAYERS, sampled: int = 10) -> Observer:
    return Observer(block, layers, SquaredNorm, tokens=30, sampled=sampled)


def test_layers_that_read_the_same_tensor_share_its_statistic_and_sample():
    block = Block()
    observer = observer_of(block)
    for window in HIDDEN.split(2):
        observer.run(window, block)
    first, second = observer.finish(None)
    assert (first.layers, second.layers) == (LAYERS[:2], LAYERS[2:])
    torch.testing.assert_close(first.statistic.squared_norm, HIDDEN.square().sum(dim=(0, 1)) / 6)
    assert first.tokens == second.tokens == 30


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_sample_is_every_third_token_whatever_the_micro_batch(batch):
    block = Block()
    observer = observer_of(block)
    for windows in HIDDEN.split(batch):
        observer.run(windows, block)
    assert torch.equal(observer.finish(None)[0].sampled(), HIDDEN.view(30, 4)[::3])


@pytest.mark.parametrize(("windows", "length", "sampled"), [(32, 512, 256), (128, 2048, 256), (5, 7, 1)])
def test_the_sample_has_tokens_of_all_positions_in_a_window_alike(windows, length, sampled):
    stream = SimpleNamespace(all_windows=windows, shape=(windows, length), first_window=0)
    taken = torch.arange(windows * length)[:: even_sample(stream, sampled).stride] % length
    assert 0.9 * sampled <= len(taken) <= sampled
    assert (taken == 0).sum() <= 1 + len(taken) // length
    if sampled > 1:
        assert taken.float().mean() == pytest.approx(length / 2, rel=0.1)


def test_no_output_of_the_last_layer_is_computed_once_it_is_known():
    block, calls = Block(), []
    block.output.register_forward_hook(lambda *_: calls.append(1))
    observer = observer_of(block)
    for windows in HIDDEN.split(2):
        observer.run_to_last_input(windows, block)
    assert len(calls) == 1
    assert [inputs.tokens for inputs in observer.finish(None)] == [30, 30]
    torch.testing.assert_close(observer.run(HIDDEN, block), block(HIDDEN))


class Halved(Block):
    """Reads some tokens of each window alone. first: of the first window, likewise of it alone."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(self.query(hidden[:, ::2].flatten(0, 1)[self.first :]))


def test_a_last_layer_that_is_called_twice_is_observed_in_both_calls():
    class Twice(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.output(self.query(hidden)) + self.output(self.key(hidden))

    block = Twice()
    whole = observer_of(block)
    for windows in HIDDEN.split(2):
        whole.run(windows, block)
    of_whole = whole.finish(None)
    stopped = observer_of(block)
    for windows in HIDDEN.split(2):
        stopped.run_to_last_input(windows, block)
    for expected, found in zip(of_whole, stopped.finish(None), strict=True):
        assert found.tokens == expected.tokens
        assert torch.equal(found.statistic.squared_norm, expected.statistic.squared_norm)


@pytest.mark.parametrize("calls", ["qkQ", "kqQ", "qQk", "qQkK", "kqQK", "qkKQ", "qkqK"])
def test_a_layer_that_is_called_again_with_another_input_shares_none_and_loses_none(calls):
    """Small letters read the block's input, large ones its double, in this order."""

    class Again(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            layers, doubled = {"q": self.query, "k": self.key}, 2 * hidden
            return self.output(sum(layers[call.lower()](hidden if call.islower() else doubled) for call in calls))

    block = Again()
    observer = observer_of(block)
    for windows in HIDDEN.split(2):
        observer.run(windows, block)
    of = {layer: inputs for inputs in observer.finish(None) for layer in inputs.layers}
    squares = HIDDEN.square().sum(dim=(0, 1)) / 6
    for layer, letter in zip(LAYERS, "qk", strict=False):
        read = [1 if call.islower() else 4 for call in calls if call.lower() == letter]
        torch.testing.assert_close(of[layer].statistic.squared_norm * of[layer].tokens / 30, squares * sum(read))
        assert of[layer].tokens == 30 * len(read)
        assert of[layer].sampled().shape == (10 * len(read), 4)


def test_a_layer_that_reads_other_tokens_than_its_block_is_observed_on_those():
    block = Halved()
    observer = observer_of(block)
    observer.run(HIDDEN, block)
    query, _ = observer.finish(None)
    assert query.tokens == 18
    torch.testing.assert_close(query.statistic.squared_norm, HIDDEN[:, ::2].square().sum(dim=1).mean(dim=0))


def test_a_layer_that_reads_more_of_one_window_than_of_another_is_named():
    block = Halved(first=1)
    with pytest.raises(PruningError, match=r"layer query.weight: found 17 rows of inputs, wanted as many for each of 6 windows"):
        observer_of(block).run(HIDDEN, block)


def test_a_finished_observer_leaves_no_hook():
    block = Block()
    observer = observer_of(block)
    observer.run(HIDDEN, block)
    observer.finish(None)
    assert not any(module._forward_pre_hooks for module in block.modules())
