"""Matrices in groups of rows that have inputs of their own: DBRX's experts, DeepSeek V4's output projection.

test_every_model_type compares their masks with a plain reference.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.model import load_model
from stages.errors import ReleaseError
from stages.release.packing import pack
from stages.release.verification import verify
from stages.streaming.decoder import Decoder
from tests import tiny
from tests.methods import WANDA, sparsegpt
from tests.pruning.test_architectures import CPU, HALF, WINDOWS, streamed, written
from tests.small_models import small
from tests.streaming.test_every_model_type import write

NAMES = {"dbrx": ("transformer.blocks.1.ffn.experts.mlp.w2", 4), "deepseek_v4": ("model.layers.1.attn.wo_a.weight", 8)}


@pytest.fixture(scope="module", params=NAMES)
def base(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    write(directory / "source", small(request.param))
    return request.param, tiny.fetched(directory / "source", directory)


@pytest.mark.filterwarnings("default")
def test_the_delta_has_the_shape_of_the_checkpoint_and_the_release_is_sound(base, tmp_path):
    kind, checkpoint = base
    name, groups = NAMES[kind]
    decoder, blocks = streamed(checkpoint, WANDA, HALF)
    matrices = [matrix for matrix in decoder.matrices[1] if matrix.tensor == name]
    assert [matrix.name for matrix in matrices] == [f"{name}[{group}]" for group in range(groups)]
    assert blocks[1].changes[name].shape == checkpoint.shape(name)
    delta = written(tmp_path / "sparse", checkpoint, blocks)
    ours = load_model(checkpoint, delta.apply, dtype=torch.float32, device=CPU)
    if ours._can_set_experts_implementation():
        ours.set_experts_implementation("eager")
    (tmp_path / "release").mkdir()
    pack(checkpoint, delta, tmp_path / "release")
    assert verify(tmp_path / "release", checkpoint, delta).sparsity == pytest.approx(0.5, abs=0.001)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32).eval()
    if stock._can_set_experts_implementation():
        stock.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(ours(WINDOWS).logits, stock(WINDOWS).logits)


@pytest.mark.filterwarnings("default")
def test_a_manifest_that_does_not_list_every_group_is_refused(base, tmp_path):
    kind, checkpoint = base
    name, groups = NAMES[kind]
    _, blocks = streamed(checkpoint, WANDA, HALF)
    for block in blocks:
        block.matrices = [one for one in block.matrices if one.matrix.name != f"{name}[{groups - 1}]"]
    delta = written(tmp_path / "sparse", checkpoint, blocks)
    (tmp_path / "release").mkdir()
    pack(checkpoint, delta, tmp_path / "release")
    with pytest.raises(ReleaseError, match=name.replace(".", r"\.")):
        verify(tmp_path / "release", checkpoint, delta)


@pytest.mark.filterwarnings("default")
def test_new_values_of_kept_weights_are_those_of_their_group(base):
    kind, checkpoint = base
    name, groups = NAMES[kind]
    name = name.replace(".1.", ".0.")  # whose inputs no method changes
    (swept, *_), (cut, *_) = (streamed(checkpoint, method, HALF)[1] for method in (sparsegpt(), WANDA))
    dense = checkpoint.tensor(name)
    sparse = swept.changes[name].apply(dense)
    assert sparse.shape == dense.shape
    assert ((sparse != dense).view(groups, -1).float().mean(dim=1) > 0.5).all()
    errors = [[one.relative_error for one in block.matrices if one.matrix.tensor == name] for block in (swept, cut)]
    assert sum(errors[0]) < sum(errors[1])


@pytest.mark.filterwarnings("default")
def test_a_float16_computation_scores_the_stored_weights_of_a_group(base):
    kind, checkpoint = base
    name, _ = NAMES[kind]
    decoder = Decoder(checkpoint, torch.float16, CPU)
    groups = [matrix for matrix in decoder.matrices[1] if matrix.tensor == name]  # found before a block is loaded, as for a plan
    with decoder.loaded(1, decoder.read(1)) as block:
        for matrix in groups:
            assert torch.equal(decoder.stored(matrix, block), matrix.stored_in(checkpoint.tensor(name)).float())
