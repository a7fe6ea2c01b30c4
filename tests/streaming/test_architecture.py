import pytest
import torch
from torch import nn

from stages.checkpoint.layout import ParameterSlice
from stages.errors import ArchitectureError
from stages.streaming.architecture import Layer, Matrix, find_blocks
from stages.streaming.decoder import Decoder
from tests.pruning.test_architectures import fetched

CPU = torch.device("cpu")


@pytest.fixture()
def decoder(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def test_blocks_are_the_one_outermost_list_of_their_number(decoder):
    assert find_blocks(decoder.model) == ("model.layers", decoder.blocks)


def test_blocks_that_are_not_one_list_are_refused_by_name(decoder):
    decoder.model.others = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ArchitectureError, match="mistral: found 2 lists of 3 modules, wanted one list of decoder blocks; .* not supported"):
        find_blocks(decoder.model)
    decoder.model.config.num_hidden_layers = 99
    with pytest.raises(
        ArchitectureError, match="mistral: found 0 lists of 99 modules, wanted one list of decoder blocks; .* not supported"
    ):
        find_blocks(decoder.model)


def test_a_linear_layer_is_one_matrix_named_as_in_the_checkpoint(decoder):
    (up,) = (matrix for matrix in decoder.matrices[1] if matrix.tensor == "model.layers.1.mlp.up_proj.weight")
    inner = ParameterSlice(name="mlp.up_proj.weight")
    assert up == Matrix(tensor=up.tensor, expert=None, parameter_slice=inner, transposed=False, shape=(112, 32))
    assert (up.name, up.size) == (up.tensor, 3584)
    assert up.layer in decoder.layers(1)
    assert up.layer == Layer("mlp.up_proj.weight", None)
    assert up.layer.module == "mlp.up_proj"


def test_experts_are_matrices_of_slices_and_routers_are_none(tmp_path):
    decoder = Decoder(fetched("mixtral", tmp_path), torch.float32, CPU)
    by_name = {matrix.tensor: matrix for matrix in decoder.matrices[0]}
    gate, up = (by_name[f"model.layers.0.block_sparse_moe.experts.3.{name}.weight"] for name in ("w1", "w3"))
    assert gate.parameter_slice == ParameterSlice(name="mlp.experts.gate_up_proj", expert=3, rows=(0, 48))
    assert up.parameter_slice == ParameterSlice(name="mlp.experts.gate_up_proj", expert=3, rows=(48, 96))
    assert gate.layer == up.layer == Layer("mlp.experts.gate_up_proj", 3)
    assert gate.rows_of(torch.arange(96)).tolist() == list(range(48))
    assert not any("gate.weight" in name for name in by_name)


def test_a_parameter_that_no_token_is_multiplied_with_is_no_matrix(decoder):
    matrices = decoder.matrices
    del decoder._matrices_in_scope, decoder._tensors
    decoder.blocks[1].mlp.register_parameter("filters", nn.Parameter(torch.empty(4, 8, 8, device="meta")))
    decoder.layout["model.layers.1.mlp.filters"] = ParameterSlice(name="model.layers.1.mlp.filters")
    assert decoder.matrices == matrices


def test_a_matrix_that_is_tied_is_refused_by_name(decoder):
    decoder.blocks[2].mlp.up_proj.weight = decoder.blocks[1].mlp.up_proj.weight
    with pytest.raises(ArchitectureError, match="mistral: model.layers.1.mlp.up_proj.weight is tied to another tensor"):
        _ = decoder.matrices


def test_a_block_without_linear_layers_is_refused_by_its_index(decoder):
    for name in list(decoder.layout):
        if name.startswith("model.layers.1.") and "norm" not in name:
            del decoder.layout[name]
    with pytest.raises(ArchitectureError, match="mistral: block 1 has no linear layers to prune"):
        _ = decoder.matrices
