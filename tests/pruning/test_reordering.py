from dataclasses import replace

import pytest
import torch

from stages.checkpoint.delta import Change, read_block, write_block
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.errors import PruningError
from stages.pruning.block_loop import Plan, prune_blocks
from stages.pruning.method import Damping
from stages.pruning.patterns import Nm, Unstructured
from stages.pruning.reconstruction import Reconstruction
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import architectures, deltas
from tests.methods import WANDA, made, sparsegpt

CPU, TWO_OF_FOUR = torch.device("cpu"), Nm(kept=2, group=4)
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


class Applied:
    """Changes in the place of a delta on disk."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self.changes = changes

    def __contains__(self, name: object) -> bool:
        return name in self.changes

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.changes[name].apply(tensor) if name in self.changes else tensor


def prune(base, method=WANDA, rounds: int | None = 4, dtype=torch.float32, windows=WINDOWS, pattern=TWO_OF_FOUR, **more):
    decoder = Decoder(base, dtype, CPU)
    with decoder.before_blocks():
        stream = Stream(decoder, torch.cat([windows, HELD_OUT]), batch=2, held_out=len(HELD_OUT))
    patterns = {matrix.name: pattern for block in decoder.matrices for matrix in block}
    how = {"propagate": "pruned", "error_tokens": 120, "expert_tokens": 0, "permutation_rounds": rounds, **more}
    blocks = list(prune_blocks(stream, Plan(method=method, patterns=patterns, **how)))
    return {name: change for block in blocks for name, change in block.changes.items()}, stream.hidden[: len(windows)], blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_masks_the_reordered_model_is_the_dense_one(base, dtype):
    changes, _, _ = prune(base, dtype=dtype)
    for name, change in changes.items():
        changes[name] = Change(mask=torch.ones_like(change.mask), values=change.values, rows=change.rows, columns=change.columns)
    assert any(change.columns is not None for change in changes.values())
    dense, reordered = (load_model(base, apply, dtype=torch.float32, device=CPU) for apply in (None, Applied(changes).apply))
    with torch.no_grad():
        torch.testing.assert_close(reordered(WINDOWS).logits, dense(WINDOWS).logits, rtol=1e-4, atol=1e-5)


def test_exactly_the_mlps_are_permuted(base):
    changes, _, _ = prune(base)
    for name, change in changes.items():
        assert (change.columns is not None) == name.endswith("down_proj.weight")
        assert (change.rows is not None) == name.endswith(("gate_proj.weight", "up_proj.weight"))


LEARNING = {"reconstruction": Reconstruction(epochs=1, learning_rate=0.01, search=False)}
ADMM = compose.method("admm_short")


@pytest.mark.parametrize("pattern", [Nm(kept=2, group=4), Nm(kept=4, group=8)], ids=str)
@pytest.mark.parametrize(("method", "more"), [(WANDA, {}), (sparsegpt(), {}), (ADMM, {}), (ADMM, LEARNING)])
def test_every_group_keeps_n_of_m_and_the_delta_gives_the_model_that_was_calibrated(base, method, more, pattern):
    changes, hidden, _ = prune(base, method, pattern=pattern, **more)
    model = load_model(base, Applied(changes).apply, dtype=torch.float32, device=CPU)
    assert any(change.columns is not None for change in changes.values())
    for name, change in changes.items():
        assert (change.mask.view(-1, pattern.group).sum(dim=1) == pattern.kept).all()
        assert torch.equal(model.get_parameter(name) != 0, change.mask)
    with torch.no_grad():
        second = model.model(WINDOWS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(second, hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("method", [WANDA, ADMM])
def test_experts_are_permuted_one_by_one(tmp_path, kind, method):
    """qwen2_moe: the experts, and MLPs without experts in every other block."""
    base, windows = Checkpoint(architectures.write(tmp_path, kind)), WINDOWS % 90
    changes, hidden, _ = prune(base, method, windows=windows)
    orders = {name: tuple(change.columns.tolist()) for name, change in changes.items() if change.columns is not None}
    assert set(orders) == {name for name in changes if name.endswith(("w2.weight", "down_proj.weight"))}
    assert len(set(orders.values())) > 4
    assert all(change.mask.view(-1, 4).sum(dim=1).eq(2).all() for change in changes.values())
    model = load_model(base, Applied(changes).apply, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        states = model.model(windows, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-2], hidden, rtol=1e-3, atol=1e-4)


def test_the_down_projections_lose_less(base):
    def errors(rounds):
        _, _, blocks = prune(base, rounds=rounds)
        return [m.relative_error for block in blocks for m in block.matrices if m.matrix.name.endswith("down_proj.weight")]

    assert sum(errors(4)) < sum(errors(None))


def test_a_change_with_orders_is_the_same_after_writing_and_reading(tmp_path):
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    change = Change(mask=torch.tensor([[True, False, True]] * 3), rows=order, columns=order.flip(0))
    write_block(tmp_path / "block", {"a": change}, base="c0ffee")
    read = read_block(tmp_path / "block", deltas.no_base)["a"]
    weight = torch.arange(9.0).view(3, 3)
    assert read.apply(weight).tolist() == change.apply(weight).tolist() == [[7, 0, 8], [1, 0, 2], [4, 0, 5]]


def test_scores_that_cannot_be_computed_name_the_layer(base):
    method = replace(made("obs"), damping=Damping(share=1e-30, limit=1e-30, shrinkage=False))
    with pytest.raises(PruningError, match="layer model.layers.0.mlp.down_proj.weight: the Gram matrix of the inputs does not factor"):
        prune(base, method, windows=WINDOWS[:1])  # of fewer tokens than columns


def test_a_pattern_other_than_n_of_m_is_refused_naming_the_layer(base):
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.down_proj.weight: found Unstructured.*, wanted an N:M pattern"):
        prune(base, pattern=Unstructured(sparsity=0.5, comparison_group="row"))


def test_a_block_without_channels_that_can_be_permuted_is_refused(tmp_path):
    with pytest.raises(PruningError, match="block 0: found no input channels that can be permuted"):
        prune(Checkpoint(architectures.write(tmp_path, "gpt2")), windows=WINDOWS % 90)


def test_columns_of_blocks_that_are_not_permutable_stay(base):
    changes, _, _ = prune(base, permutable=frozenset({1}))
    assert {name for name, change in changes.items() if change.columns is not None} == {"model.layers.1.mlp.down_proj.weight"}
