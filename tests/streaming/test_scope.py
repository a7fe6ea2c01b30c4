"""What is in scope, of models without weights: of every model type that is pruned, and of some at their published sizes."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from stages.checkpoint.layout import Layout, ParameterSlice, tied_names
from stages.errors import ArchitectureError
from stages.streaming import decoder as decoders
from stages.streaming.decoder import Decoder
from tests.small_models import small
from tests.streaming.test_every_model_type import BUILT, REASONS, write

CPU = torch.device("cpu")
PRUNED = [kind for kind in BUILT if kind not in REASONS and kind != "longcat_flash"]  # whose experts have to be stored apart, see below
LEFT_OUT = re.compile(  # as docs/engine.md says: of matrices that are linear layers, or hold several
    r"router|mlp\.gate\.|shared_expert_gate"  # routers, and gates of a shared expert
    r"|conv\w*\.weight$|time_mix|A_log"  # filters of convolutions, and parameters of recurrences
    r"|encoder_attn|crossattention"  # to an encoder that is not there
)


@pytest.fixture()
def decoder_of(tmp_path, monkeypatch):
    """Makes the decoder of a configuration, in a dtype, without a checkpoint: all tensors are parameters of the model."""

    def layout(model, _) -> Layout:
        names = model.state_dict().keys() - tied_names(model)
        return Layout(slices={name: ParameterSlice(name=name) for name in names}, conversions=[], converted=[])

    def decoder(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Decoder:
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
        config.save_pretrained(tmp_path)
        monkeypatch.setattr(decoders, "read_layout", layout)
        return Decoder(SimpleNamespace(directory=tmp_path), dtype, CPU)

    return decoder


def names(decoder: Decoder) -> set[str]:
    """The parameters in scope, without the path of the blocks."""
    every = (matrices for of_block in (decoder.matrices, decoder.reused) for matrices in of_block)
    return {matrix.tensor.removeprefix(f"{decoder.prefix}.") for matrices in every for matrix in matrices}


@pytest.mark.filterwarnings("default")  # of models at their small sizes
@pytest.mark.parametrize("kind", PRUNED)
def test_the_same_is_in_scope_in_any_dtype(kind, decoder_of):
    scopes = [decoder_of(small(kind), dtype).matrices for dtype in (torch.float32, torch.bfloat16)]
    assert scopes[0] == scopes[1]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", PRUNED)
def test_every_matrix_of_the_blocks_is_in_scope_unless_it_is_documented_as_left_out(kind, decoder_of):
    decoder = decoder_of(small(kind))
    scope = {f"{decoder.prefix}.{name}" for name in names(decoder)}
    tied, left_out = decoder.model.all_tied_weights_keys, set()
    for path, module in decoder.blocks.named_modules(prefix=decoder.prefix, remove_duplicate=False):
        linear = isinstance(module, (nn.Linear, Conv1D))
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if (parameter.dim() == 3 or (linear and leaf == "weight")) and tied.get(name, name) not in scope:
                left_out.add(name)
    assert not [name for name in left_out if not re.search(LEFT_OUT, name)]
    assert not [name for name in scope if re.search(LEFT_OUT, name)]


def test_a_shared_expert_with_a_row_for_each_routed_expert_is_in_scope_and_the_router_is_not(decoder_of):
    """As published of Qwen3-Next, both are 512."""
    config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=4)
    assert config.shared_expert_intermediate_size == config.num_experts == 512
    scope = {name for name in names(decoder_of(config)) if ".mlp." in name}
    of_mlp = [*(f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")), "experts.gate_up_proj", "experts.down_proj"]
    assert scope == {f"{index}.mlp.{name}" for index in range(4) for name in of_mlp}


def test_rows_of_experts_without_weights_are_not_in_scope(tmp_path):
    """Of LongCat, whose gates and up-projections are two more than its down-projections."""
    (of_block, *_) = Decoder(write(tmp_path, small("longcat_flash")), torch.float32, CPU).matrices
    experts = {
        (matrix.parameter_slice.name, matrix.parameter_slice.expert) for matrix in of_block if matrix.parameter_slice.expert is not None
    }
    assert experts == {(f"mlp.experts.{name}", expert) for name in ("gate_up_proj", "down_proj") for expert in range(4)}


def test_a_tensor_that_holds_experts_with_and_without_weights_is_refused(decoder_of):
    with pytest.raises(ArchitectureError, match="gate_up_proj holds 6 experts, of which 4 are in all parameters, wanted all of them"):
        _ = decoder_of(small("longcat_flash")).matrices


def test_a_router_of_several_layers_is_not_in_scope(decoder_of):
    assert not any(".mlp.gate." in name for name in names(decoder_of(small("zaya"))))


def test_a_router_that_scales_shared_experts_is_not_in_scope(decoder_of):
    scope = names(decoder_of(small("inkling_text")))
    assert not any(".mlp.gate." in name for name in scope)
    assert any(".mlp.shared_experts.gate_proj" in name for name in scope)


def test_matrices_that_mix_streams_of_hidden_states_are_in_scope(decoder_of):
    for kind, mixers in (("deepseek_v4", ("attn_hc.fn", "ffn_hc.fn")), ("hy_v4", ("fn",))):
        for dtype in (torch.float32, torch.bfloat16):
            scope = names(decoder_of(small(kind), dtype))
            assert all(any(name.endswith(mixer) for name in scope) for mixer in mixers), (kind, dtype)
