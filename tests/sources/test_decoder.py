import hashlib
import json

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from stages.errors import SourceError
from stages.sources import base as checkpoints
from stages.sources.base import HubBase
from stages.sources.decoder import require_decoder
from tests import architectures, multimodal

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
PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
PLAIN = {**architectures.CONFIGS, **{kind: config for kind, (config, _) in architectures.REFUSED.items()}, "dbrx": {}}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_checkpoint_is_taken_as_the_class_that_generates_text(kind):
    config = AutoConfig.for_model(kind).to_dict()
    require_decoder(config | {"architectures": [MULTIMODAL[kind]]}, "here")
    with pytest.raises(SourceError, match=rf"here: found architecture \['OtherModel'\] of type '{kind}', wanted .*{MULTIMODAL[kind]}"):
        require_decoder(config | {"architectures": ["OtherModel"]}, "here")


@pytest.mark.parametrize("kind", ["florence2", "pix2struct", "t5gemma2", "udop", "vision-encoder-decoder"])
def test_an_encoder_decoder_is_refused_whatever_it_reads(kind):
    with pytest.raises(SourceError, match=r"here: \['AnyModel'\] is an encoder-decoder, wanted a decoder language model"):
        require_decoder({"model_type": kind, "architectures": ["AnyModel"]}, "here")


@pytest.mark.parametrize("inner", [{"model_type": "t5"}, {"model_type": "opt", "is_encoder_decoder": True}])
def test_a_multimodal_model_whose_language_model_is_an_encoder_decoder_is_refused(inner):
    config = {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}
    require_decoder(config | {"text_config": {"model_type": "opt"}}, "here")
    with pytest.raises(SourceError, match=r"'Blip2ForConditionalGeneration'\] is an encoder-decoder"):
        require_decoder(config | {"text_config": inner}, "here")


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_decoder_is_taken(kind):
    config = AutoConfig.for_model(kind, **PLAIN[kind])
    require_decoder(config.to_dict() | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]}, "here")


def test_a_repository_of_another_class_is_refused_before_any_weight_is_downloaded(source, hub_repository, tmp_path):
    config = AutoConfig.for_model("gemma3").to_dict() | {"architectures": ["Gemma3Model"]}
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    repository = hub_repository("org/gemma", {**files, "config.json": json.dumps(config, default=str).encode()})
    (tmp_path / "out").mkdir()
    base = HubBase(source="hub", repo="org/gemma", revision="main", license="gemma")
    with pytest.raises(SourceError, match=r"hub model org/gemma: found architecture \['Gemma3Model'\].*Gemma3ForConditionalGeneration"):
        checkpoints.fetch(base, tmp_path / "out", downloads=tmp_path / "downloads")
    assert not any(name.endswith(".safetensors") for _, name, _ in repository.requests)


def test_the_files_of_a_processor_come_along_from_a_hub_byte_for_byte(hub_repository, tmp_path):
    checkpoint = multimodal.write(tmp_path / "gemma", "gemma3")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files["tokenizer.json"] = b"{}"
    ours = {name: f'{{"of": "{name}"}}  \n'.encode() for name in PROCESSOR}
    hub_repository("org/gemma", {**files, **ours, "evil_processor.py": b"code"})
    (tmp_path / "out").mkdir()
    base = HubBase(source="hub", repo="org/gemma", revision="main", license="gemma")
    provenance = checkpoints.fetch(base, tmp_path / "out", downloads=tmp_path / "downloads")
    for name, content in ours.items():
        assert (tmp_path / "out" / name).read_bytes() == content
        assert provenance["files"][name] == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "out/evil_processor.py").exists()


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(SourceError, match="here: found list in config.json, wanted an object with model_type"):
        require_decoder([], "here")
