"""Matrices that several blocks multiply by; test_architectures compares the masks of zamba2 with a plain reference."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from stages import prune
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.errors import ArchitectureError
from stages.evaluation.metric import Corpus
from stages.evaluation.metrics import METRICS
from stages.evaluation.scoring import StreamedModels
from stages.pruning.block_loop import prune_blocks
from stages.pruning.inputs import Inputs
from stages.pruning.plan import Plan
from stages.pruning.shared import SharedInputs
from stages.pruning.statistics import Gram, Moments, SquaredNorm
from stages.streaming.architecture import Layer
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.methods import WANDA, sparsegpt
from tests.pruning.test_architectures import CPU, HALF, WINDOWS, fetched

SHARED = "model.layers.1.shared_transformer."
GATE_UP, FIRST, SECOND = (Layer(name, None) for name in ("gate_up.weight", "adapter.0.weight", "adapter.1.weight"))


@pytest.fixture(scope="module")
def zamba(tmp_path_factory) -> Checkpoint:
    return fetched("zamba2", tmp_path_factory.mktemp("zamba2"))


def blocks_of(zamba, method=WANDA, propagate="pruned", done=lambda _: None, held_out=1):
    decoder = Decoder(zamba, torch.float32, CPU)
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(method=method, patterns=dict.fromkeys(names, HALF), propagate=propagate, error_tokens=60, expert_tokens=0)
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=2, held_out=held_out)
    return decoder, list(prune_blocks(stream, plan, done))


def inputs(kind, tokens, *layers) -> Inputs:
    statistic = kind(tokens.shape[-1], CPU)
    statistic.add(tokens)
    statistic.finish()
    return Inputs(layers=list(layers), statistic=statistic, sample=[tokens.flatten(0, 1)], tokens=tokens[..., 0].numel())


@pytest.mark.parametrize("kind", [SquaredNorm, Moments, Gram])
def test_a_statistic_that_includes_another_is_that_of_all_windows(kind):
    windows = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0))
    both, known, other = kind(12, CPU), kind(12, CPU), kind(12, CPU)
    for statistic, part in ((both, windows), (known, windows[:2]), (other, windows[2:])):
        statistic.add(part)
        statistic.finish()
    known.include(other)
    torch.testing.assert_close(known.squared_norm, both.squared_norm)
    for field, value in vars(both).items():
        torch.testing.assert_close(getattr(known, field), value, rtol=1e-6, atol=1e-5)


def test_layers_that_read_the_same_in_one_block_alone_have_statistics_of_their_own():
    first, second = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    shared = SharedInputs[Gram]()
    shared.include([inputs(Gram, first, GATE_UP, FIRST)], {GATE_UP: first[0], FIRST: first[0]})
    shared.include([inputs(Gram, second, GATE_UP, SECOND)], {GATE_UP: second[0], SECOND: second[0]})
    found = {layer: use for use in shared.inputs for layer in use.layers}
    assert [len(use.layers) for use in shared.inputs] == [1, 1, 1]
    read = {GATE_UP: torch.cat([first, second]), FIRST: first, SECOND: second}
    assert shared.layers == set(read)
    for layer, windows in read.items():
        tokens = windows.flatten(0, 1)
        torch.testing.assert_close(found[layer].statistic.value, tokens.T @ tokens)
        assert torch.equal(found[layer].sampled(), tokens)
        assert found[layer].tokens == len(tokens)
    assert torch.equal(shared.held_out[GATE_UP], torch.cat([first[0], second[0]]))
    assert torch.equal(shared.held_out[SECOND], second[0])


@pytest.mark.parametrize("method", [WANDA, sparsegpt()])
def test_a_matrix_of_several_blocks_is_pruned_once_for_what_the_dense_model_reads_in_all_of_them(zamba, method):
    decoder, blocks = blocks_of(zamba, method)
    assert {matrix.tensor for matrix in decoder.reused[3]} == {name for name in blocks[1].changes if name.startswith(SHARED)}
    assert not any(name.startswith(SHARED) for index in (0, 2, 3) for name in blocks[index].changes)
    of_matrix = {result.matrix.name.removeprefix(SHARED): result for result in blocks[1].matrices}
    tokens = (len(WINDOWS) - 1) * WINDOWS.shape[1]
    assert of_matrix["self_attn.q_proj.weight"].tokens == of_matrix["feed_forward.down_proj.weight"].tokens == 2 * tokens
    assert of_matrix["feed_forward.gate_up_proj_adapter_list.1.0.weight"].tokens == tokens  # which the second block alone runs
    assert all(0 < result.relative_error < 1 and 0 < result.held_out_error < 1 for result in of_matrix.values())
    _, in_one_pass = blocks_of(zamba, method, propagate="dense")
    for name in decoder.reused[3]:
        assert torch.equal(in_one_pass[1].changes[name.tensor].mask, blocks[1].changes[name.tensor].mask)
    later = "model.layers.3.linear.weight"  # reads the output of the shared block, pruned or not
    assert not torch.equal(in_one_pass[3].changes[later].mask, blocks[3].changes[later].mask)


@pytest.mark.parametrize("finished", [1, 2, 3])
@pytest.mark.parametrize("method", [WANDA, sparsegpt()])
def test_a_run_that_goes_on_gives_later_blocks_the_matrices_that_earlier_ones_pruned(zamba, finished, method, monkeypatch):
    _, blocks = blocks_of(zamba, method)
    if finished > 1:  # the shared matrices are there: the dense model does not run again
        monkeypatch.setattr("stages.pruning.block_loop.observe_shared", None)
    _, resumed = blocks_of(zamba, method, done=lambda index: dict(blocks[index].changes) if index < finished else None)
    assert [block.index for block in resumed] == list(range(finished, 4))
    for block in resumed:
        for name, change in block.changes.items():
            before = blocks[block.index].changes[name]
            assert torch.equal(change.mask, before.mask), name
            assert method == WANDA or torch.equal(change.values, before.values), name


@torch.no_grad()
def test_a_delta_is_scored_block_by_block_as_by_the_whole_model(zamba, tmp_path):
    decoder, blocks = blocks_of(zamba, sparsegpt())
    changes = {name: change for block in blocks for name, change in block.changes.items()}

    def apply(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return changes[name].apply(tensor) if name in changes else tensor

    corpus = Corpus(name="any", windows=WINDOWS, clusters=list(range(len(WINDOWS))))
    models = StreamedModels(decoder=decoder, variants={"sparse": apply}, scratch=tmp_path)
    (streamed,) = METRICS["perplexity"].measure(corpus, models.observe([corpus], [METRICS["perplexity"]])["sparse"]["any"], None)
    whole = load_model(zamba, apply, dtype=torch.float32, device=CPU)(WINDOWS).logits
    losses = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert streamed.value == pytest.approx(losses.exp().item(), rel=1e-5)


def test_a_checkpoint_that_stores_such_a_matrix_twice_is_refused_by_its_name(zamba, tmp_path):
    shutil.copytree(zamba.directory, tmp_path / "base")
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    name = f"{SHARED}self_attn.q_proj.weight"
    again = name.replace("layers.1.", "layers.3.")
    save_file({again: zamba.tensor(name) + 1}, tmp_path / "base/again.safetensors")
    index["weight_map"][again] = "again.safetensors"
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ArchitectureError, match=f"{again} is tied to another tensor, wanted matrices of the blocks alone, each stored once"
    ):
        _ = Decoder(Checkpoint(tmp_path / "base"), torch.float32, CPU).matrices


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        ("allocation=loss method.comparison_group=matrix", "allocation=loss"),
        ("reconstruction=block", "reconstruction=block"),
        ("reconstruction=distilled", "reconstruction=distilled"),
        ("prune=sequential", "prune.propagate = sequential"),
        ("pattern=nm_2_4 pattern.permutation_rounds=1", "pattern.permutation_rounds"),
    ],
)
def test_an_option_that_prunes_for_one_block_alone_is_refused_by_name_before_any_weight_is_read(zamba, overrides, option, monkeypatch):
    chosen = compose.read(*overrides.split())
    monkeypatch.setattr(Checkpoint, "tensor", None)
    sections = [chosen[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune")]
    with pytest.raises(ArchitectureError, match=f"zamba2: several blocks multiply by {SHARED}.*, which {option} does not take"):
        prune.plan_of(Decoder(zamba, torch.float32, CPU), *sections)
