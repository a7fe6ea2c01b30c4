import json

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from stages.errors import SourceError
from stages.sources import base as checkpoints
from stages.sources.base import HubBase
from stages.sources.decoder import require_decoder
from tests import architectures

# Multimodal checkpoints, by model type: some are in transformers' table of language models, and some are not.
MULTIMODAL = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3n": "Gemma3nForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "idefics": "IdeficsForVisionText2Text",
    "idefics3": "Idefics3ForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
    "fuyu": "FuyuForCausalLM",
    "git": "GitForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "emu3": "Emu3ForCausalLM",
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "chameleon": "ChameleonForConditionalGeneration",
}
PLAIN = {**architectures.CONFIGS, **{kind: config for kind, (config, _) in architectures.REFUSED.items()}, "dbrx": {}}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_checkpoint_is_refused_by_its_architecture(kind):
    config = AutoConfig.for_model(kind).to_dict() | {"architectures": [MULTIMODAL[kind]]}
    message = rf"'{MULTIMODAL[kind]}'.* joins several models .*the text decoder of a multimodal checkpoint is not supported yet"
    with pytest.raises(SourceError, match=message):
        require_decoder(config, "here")


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_decoder_is_taken(kind):
    config = AutoConfig.for_model(kind, **PLAIN[kind])
    require_decoder(config.to_dict() | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]}, "here")


def test_a_multimodal_repository_is_refused_before_any_weight_is_downloaded(source, hub_repository, tmp_path):
    config = AutoConfig.for_model("gemma3").to_dict() | {"architectures": ["Gemma3ForConditionalGeneration"]}
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    repository = hub_repository("org/gemma", {**files, "config.json": json.dumps(config, default=str).encode()})
    (tmp_path / "out").mkdir()
    base = HubBase(source="hub", repo="org/gemma", revision="main", license="gemma")
    with pytest.raises(SourceError, match="hub model org/gemma: .*'Gemma3ForConditionalGeneration'.* not supported yet"):
        checkpoints.fetch(base, tmp_path / "out", downloads=tmp_path / "downloads")
    assert not any(name.endswith(".safetensors") for _, name, _ in repository.requests)


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(SourceError, match="here: found list in config.json, wanted an object with model_type"):
        require_decoder([], "here")
