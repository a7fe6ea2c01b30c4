"""Which blocks have channels that can be permuted, before a weight is read."""

import re
from dataclasses import replace

import pytest
import torch

from stages import prune
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.errors import PruningError
from stages.pruning.permutable import permutable_blocks
from stages.streaming.decoder import Decoder
from tests import architectures

CPU = torch.device("cpu")
NONE = "found no input channels that can be permuted"


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    monkeypatch.setattr(Checkpoint, "tensor", None)


def decoder(kind, directory, dtype=torch.float32) -> Decoder:
    return Decoder(Checkpoint(architectures.write(directory, kind)), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "falcon", "mpt", "mixtral", "qwen2_moe", "deepseek_v3", "gemma4_text"])
def test_gated_and_plain_mlps_and_experts_of_their_own_tensors_are_permutable(kind, dtype, tmp_path):
    model = decoder(kind, tmp_path, dtype)
    assert permutable_blocks(model) == set(range(len(model.blocks)))
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neo", "opt", "phi", "granitemoe", "gpt_oss"])
def test_a_model_without_such_channels_is_refused_by_its_name(kind, tmp_path):
    model = decoder(kind, tmp_path)
    with pytest.raises(
        PruningError, match=f"^{re.escape(kind)}: {NONE}, wanted .* without bias, .*; set pattern.permutation_rounds to null"
    ):
        permutable_blocks(model)


@pytest.mark.parametrize("kind", ["phi3", "glm4"])
def test_gate_and_up_in_one_matrix_are_said_to_be(kind, tmp_path):
    reason = f"{kind}: {NONE} (model.layers.0.mlp.gate_up_proj.weight is gate and up in one matrix), wanted"
    with pytest.raises(PruningError, match=re.escape(reason)):
        permutable_blocks(decoder(kind, tmp_path))


def test_a_block_without_such_channels_is_none_among_others_that_have_them(tmp_path):
    """Experts are slices of one tensor in the second of two blocks, and the first has a gated MLP."""
    model = decoder("lfm2_moe", tmp_path)
    dense = [index for index, matrices in enumerate(model.matrices) if not any(matrix.parameter_slice.expert for matrix in matrices)]
    assert permutable_blocks(model) >= set(dense)


def test_a_plan_knows_them_where_columns_are_permuted(base):
    chosen = compose.read("pattern=nm_2_4_permuted")
    model = Decoder(base, torch.float32, CPU)

    def plan(pattern):
        return prune.plan_of(model, chosen["method"], pattern, chosen["allocation"], chosen["reconstruction"], chosen["prune"])

    assert plan(chosen["pattern"]).permutable == {0, 1, 2}
    assert plan(replace(chosen["pattern"], permutation_rounds=None)).permutable is None
