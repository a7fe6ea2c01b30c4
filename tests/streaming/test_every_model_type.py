"""Every model type that transformers has a language model for: streamed as the whole model computes, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, CheckpointError
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.small_models import small

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
BATCH = 2

# Why no model of a type is made here -> model types.
NOT_BUILT = {
    "its encoder wants a package that is not installed": "gemma3n",
    "transformers makes no configuration of it with default values": "gemma4_assistant",
    "transformers makes no language model of the configuration that it lists for it": "musicgen musicgen_melody",
}
NOT_MADE = {kind: reason for reason, kinds in NOT_BUILT.items() for kind in kinds.split()}

# Why a type that transformers lists is no decoder language model -> model types, which are refused or not built.
NO_DECODERS = {
    "it drafts tokens for another model, whose hidden states, keys and values it reads": "gemma4_assistant gemma4_unified_assistant",
    "it writes codes of sounds, several for a token": "musicgen musicgen_melody",
}
NO_DECODER = {kind: reason for reason, kinds in NO_DECODERS.items() for kind in kinds.split()}

# Why it is refused -> model types.
REFUSED = {
    "block 0 does not receive hidden states as its first argument": "reformer",
    "wanted [windows, tokens, ...]": "cpmant prophetnet xlnet",
    "it does not run on tokens alone": "gemma4_unified_assistant",
    "found no num_hidden_layers in its config": "blt",
    "wanted one list of decoder blocks": "hrm_text xlm",
    "wanted matrices that are joined by rows, or experts that are stacked": "inkling2_text",
    "transformers knows no decoder language model of type": "emu3 mllama",
}
REASONS = {kind: reason for reason, kinds in REFUSED.items() for kind in kinds.split()}
TYPES = {config.model_type: config for config in reversed(list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()))}
BUILT = sorted(set(TYPES) - set(NOT_MADE))


def write(directory: Path, config: PretrainedConfig) -> Checkpoint:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        random = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.1 * random if parameter.dim() == 1 else random / parameter.shape[-1] ** 0.5
    model.to(torch.bfloat16).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = dict.fromkeys(file.keys(), "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return Checkpoint(directory)


@torch.no_grad()
def streamed_logits(decoder: Decoder) -> torch.Tensor:
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=BATCH)
    for index in range(len(decoder.blocks)):
        with decoder.loaded(index, decoder.read(index)) as block:
            stream.advance(index, block)
    with decoder.after_blocks():
        return torch.cat([decoder.logits(part) for part in stream.hidden.split(BATCH)])


@torch.no_grad()
def whole_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.requires_grad_(False)  # as our parameters: torch.matmul computes otherwise where a weight wants a gradient
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return torch.cat([model(part, use_cache=False).logits for part in WINDOWS.split(BATCH)])


@pytest.mark.filterwarnings("default")  # of models at their small sizes
@pytest.mark.parametrize("kind", [kind for kind in BUILT if kind not in REASONS])
def test_a_streamed_model_gives_the_logits_of_the_whole_model(kind, tmp_path):
    decoder = Decoder(write(tmp_path, small(kind)), torch.float32, CPU)
    assert all(decoder.matrices)
    assert torch.equal(streamed_logits(decoder), whole_logits(tmp_path))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [kind for kind in BUILT if kind in REASONS])
def test_a_model_that_is_not_run_block_by_block_is_refused_with_the_reason_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    checkpoint = write(tmp_path, small(kind))
    monkeypatch.setattr(Checkpoint, "tensor", None)
    with pytest.raises((ArchitectureError, CheckpointError)) as error:
        _ = Decoder(checkpoint, torch.float32, CPU).matrices
    assert REASONS[kind] in str(error.value)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", NOT_MADE)
def test_what_is_not_built_cannot_be(kind, tmp_path):
    with pytest.raises((ImportError, AttributeError, StrictDataclassError)):
        write(tmp_path, small(kind))


def test_what_is_no_decoder_language_model_is_refused_or_not_built():
    assert NO_DECODER.keys() <= REASONS.keys() | NOT_MADE.keys()
