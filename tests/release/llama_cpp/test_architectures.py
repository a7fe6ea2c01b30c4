import pytest
import torch
from transformers import AutoConfig

from stages.errors import ArchitectureError
from stages.release.llama_cpp.architectures import architecture_of, from_pairs, rotary_factors, to_pairs
from tests.release.llama_cpp.models import CONFIGS, SIZES


def config(kind: str, **changes):
    return AutoConfig.for_model(kind.split()[0], **{**SIZES, **CONFIGS.get(kind, {}), **changes})


def test_halves_of_a_head_become_neighbouring_pairs_and_halves_again():
    rows = torch.arange(8)[:, None]  # two heads of four
    assert to_pairs(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(from_pairs(to_pairs(rows, heads=2), heads=2), rows)


def test_high_frequencies_stay_and_low_ones_are_divided():
    assert rotary_factors(config("llama")) is None
    factors = rotary_factors(config("llama 3"))
    assert (factors[0].item(), factors[-1].item()) == (pytest.approx(1.0), pytest.approx(8.0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_with_the_values_of_llama_cpp_is_taken(kind):
    assert architecture_of(config(kind)).pairs == (kind.split()[0] in ("llama", "mistral"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gpt2",
            {},
            "publish.formats: found gguf of the architecture gpt2, wanted one of llama, mistral, qwen2, qwen3, gemma3_text; leave",
        ),
        ("llama", {"hidden_act": "gelu"}, "llama as GGUF: found hidden_act 'gelu', wanted 'silu', with which llama.cpp computes"),
        ("llama", {"mlp_bias": True}, "llama as GGUF: found mlp_bias True, wanted False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "llama as GGUF: found rope_type 'linear', wanted 'default'",
        ),
        ("qwen2", {"use_sliding_window": True}, "qwen2 as GGUF: found use_sliding_window True, wanted False"),
        ("gemma3_text", {"query_pre_attn_scalar": 8}, "gemma3_text as GGUF: found query_pre_attn_scalar 8, wanted 16"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, r"gemma3_text as GGUF: found layer_types \['full_attention', .*wanted \["),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(kind, changes, message):
    with pytest.raises(ArchitectureError, match=message):
        architecture_of(config(kind, **changes))
