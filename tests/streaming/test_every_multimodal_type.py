"""Every model type that transformers lists as a multimodal language model: streamed on tokens as the whole model, or refused by name.

The sample runs always; all types that can be built small run with EVERY_MODEL_TYPE=1.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig

from stages.checkpoint.model import load_model
from stages.checkpoint.model_class import auto_class_of
from stages.checkpoint.reader import INDEX, SINGLE, Checkpoint
from stages.errors import ArchitectureError, CheckpointError
from stages.files import write_json
from stages.streaming.decoder import Decoder
from tests import multimodal
from tests.streaming.test_every_model_type import BATCH, CPU, WINDOWS, streamed_logits

LARGEST = 8_000_000  # parameters of a model that is made here
TYPES = sorted({config.model_type for config in list(MODEL_FOR_MULTIMODAL_LM_MAPPING.keys())})
ENCODER_DECODERS = {kind for kind in TYPES if getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False)}  # fetch refuses them

# Why no model of a type is made here -> model types.
NOT_BUILT = {
    "its encoder wants packages that are not installed": "fast_vlm gemma3n perception_lm",
    "its sizes depend on each other in more ways": """chameleon deepseek_ocr2 emu3 ernie4_5_vl_moe glm5_next granite4_vision
        kyutai_speech_to_text muse_spark nemo_speechlm nemotron_h_omni qwen3_omni_moe""",
    "it is large whatever its sizes": "cohere_compass janus muse_glimmer qwen2_5_omni vibevoice_asr",
    "transformers' auto classes list no class of its own for it": "evolla shieldgemma2",
}
NOT_MADE = {kind for kinds in NOT_BUILT.values() for kind in kinds.split()}

# Why it is refused -> model types.
REFUSED = {
    "it does not run on tokens alone": "blip blip-2 instructblip instructblipvideo kosmos-2 voxtral_realtime",
    "wanted blocks that share no weights with other modules": "diffusion_gemma",
    "wanted one list of decoder blocks": "idefics",
    "wanted matrices that are joined by rows, or experts that are stacked": "inkling2 inkling_mm_model molmo2",
    "found no num_hidden_layers in its config": "pi0",
}
REASONS = {kind: reason for reason, kinds in REFUSED.items() for kind in kinds.split()}
SAMPLE = """aria blip diffusion_gemma fuyu gemma3 gemma4 git idefics idefics3 kimi_k25 llama4 llava mistral3 mllama molmo2 pi0 qwen2_5_vl
    qwen2_audio qwen3_5 qwen3_vl qwen3_vl_moe"""
BUILT = [kind for kind in TYPES if kind not in ENCODER_DECODERS | NOT_MADE]
RUN = BUILT if os.environ.get("EVERY_MODEL_TYPE") else [kind for kind in BUILT if kind in SAMPLE.split()]


def written(directory: Path, kind: str) -> Checkpoint:
    if multimodal.parameters(kind) > LARGEST:
        pytest.fail(f"{kind} has {multimodal.parameters(kind)} parameters, wanted at most {LARGEST}")
    multimodal.write(directory, kind)
    if not (directory / INDEX).is_file():
        write_json(directory / INDEX, {"weight_map": dict.fromkeys(Checkpoint(directory), SINGLE)})
    return Checkpoint(directory)


@pytest.mark.filterwarnings("default")  # of models at their small sizes
@pytest.mark.parametrize("kind", [kind for kind in RUN if kind not in REASONS])
@torch.no_grad()
def test_a_streamed_text_decoder_gives_the_logits_of_the_whole_model_on_tokens_alone(kind, tmp_path):
    checkpoint = written(tmp_path, kind)
    decoder = Decoder(checkpoint, torch.float32, CPU)
    assert all(decoder.matrices)
    streamed = streamed_logits(decoder)
    whole = auto_class_of(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path, dtype=torch.float32).eval().requires_grad_(False)
    assert type(whole).__name__ == checkpoint.config["architectures"][0]
    if whole._can_set_experts_implementation():
        whole.set_experts_implementation("eager")
    assert torch.equal(streamed, torch.cat([whole(input_ids=part, use_cache=False).logits for part in WINDOWS.split(BATCH)]))
    ours = load_model(checkpoint, None, dtype=torch.float32, device=CPU).state_dict()
    for name, tensor in whole.state_dict().items():  # encoders and projectors included
        assert torch.equal(ours[name], tensor), name


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [kind for kind in RUN if kind in REASONS])
def test_what_is_no_text_decoder_is_refused_with_the_reason_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    checkpoint = written(tmp_path, kind)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    with pytest.raises((ArchitectureError, CheckpointError), match=f"^{kind}: ") as error:
        _ = Decoder(checkpoint, torch.float32, CPU).matrices
    assert REASONS[kind] in str(error.value)


def test_the_lists_name_types_that_there_are():
    assert set(REASONS) | NOT_MADE <= set(TYPES)
    assert set(SAMPLE.split()) <= set(BUILT)
