"""Small random checkpoints of multimodal models, made from their real config classes and saved by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from tests.streaming.test_every_model_type import AS_MANY_KEYS, FOUR_LAYERS, SMALL

# A small value -> the names that configurations of encoders and projectors have for sizes.
SIZES = {
    2: "depth encoder_layers num_hidden_layers num_layers spatial_merge_size temporal_patch_size",
    4: "attention_heads encoder_attention_heads num_attention_heads num_heads num_key_value_heads",
    8: "head_dim",
    14: "patch_size",
    28: "image_size",
    32: "d_model embed_dim encoder_hidden_size hidden_size out_hidden_size projection_dim",
    48: "encoder_ffn_dim ffn_dim intermediate_size",
    96: "vocab_size",
}
ENCODER = {name: value for value, names in SIZES.items() for name in names.split()}
TIME_HEIGHT_WIDTH = "cosmos3_edge glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_omni_thinker qwen2_5_vl qwen2_vl"
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")  # tokens that no window has
PLACEHOLDER = 91


def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Rotary embeddings of positions in time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **others}}


# Model type, part of its configuration -> what it wants otherwise.
OTHERWISE: dict[tuple[str, str], dict[str, Any]] = {
    **{(kind, "text_config"): rope(2, 1, 1) for kind in TIME_HEIGHT_WIDTH.split()},
    ("fun_asr_nano", "adaptor_config"): {"intermediate_size": 8},
    ("gemma3", ""): {"mm_tokens_per_image": 4},
    ("gemma4", ""): {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2, "position_embedding_size": 8, **ENCODER}},
    ("gemma4", "text_config"): FOUR_LAYERS,
    ("gemma4_unified", "text_config"): FOUR_LAYERS,
    ("glm4v_moe", "text_config"): rope(1, 1, 0, partial_rotary_factor=0.5),
    ("hunyuan_vl", "text_config"): rope(1, 1, 1, 1),
    ("inkling2", "vision_config"): {"text_hidden_size": 32},
    ("kimi_k25", "text_config"): {**AS_MANY_KEYS, "head_dim": 4},
    ("llama4", "vision_config"): {
        "intermediate_size": 128,  # of four patches together
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "vision_output_dim": 48,
    },
    ("mistral3", "vision_config"): {"image_size": 56},
    ("mistral_large4", "text_config"): AS_MANY_KEYS,
    ("molmo2", "adapter_config"): {"vision_feature_layer": [1, 0]},
    ("qwen3_5", "text_config"): {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ("qwen3_5_moe", "text_config"): {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
TEXT = ("", "text_config")


def small(kind: str) -> PretrainedConfig:
    """The configuration of a model type with small values for all sizes."""
    return _small(CONFIG_MAPPING[kind](), "", kind)


def _small(config: PretrainedConfig, part: str, kind: str) -> PretrainedConfig:
    stated, aliases, table = config.to_dict(), config.attribute_map, SMALL if part in TEXT else ENCODER
    known = {name: value for name, value in table.items() if name in stated or name in aliases}
    changed = {name: value for name, value in known.items() if not isinstance(stated.get(name), (list, dict))}
    changed |= {name: PLACEHOLDER + number for number, name in enumerate(name for name in PLACEHOLDERS if name in stated)}
    parts = {name: inner for name, inner in vars(config).items() if isinstance(inner, PretrainedConfig)}
    changed |= {name: _small(inner, f"{part}.{name}".strip("."), kind) for name, inner in parts.items()}
    return type(config)(**changed | OTHERWISE.get((kind, part), {}))


def model_class(kind: str) -> type[PreTrainedModel]:
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def parameters(kind: str) -> int:
    """Number of parameters of the small model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(kind)(small(kind)).parameters())


def write(directory: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint in shards, with weights large enough for attention and routing to tell tokens apart."""
    config = small(kind)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    model = model_class(kind)(config).eval()
    for parameter in model.parameters():
        random = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.1 * random if parameter.dim() == 1 else random / parameter.shape[-1] ** 0.5
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
    return directory


def pixels(kind: str) -> dict[str, torch.Tensor]:
    """What a processor makes of a prompt with one image."""
    vision, generator = small(kind).vision_config, torch.Generator().manual_seed(1)
    images = {"gemma3": 4, "llava": 4, "mistral3": 4}
    tokens = images.get(kind, 1)
    ids = torch.tensor([[5, *[PLACEHOLDER] * tokens, 7, 8]])
    of_image = (ids == PLACEHOLDER).long()
    patch = 3 * vision.patch_size**2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    match kind:
        case "gemma3":
            return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28), "token_type_ids": of_image}
        case "gemma4":
            places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
            return {"input_ids": ids, "pixel_values": random(1, 4, patch), "image_position_ids": places, "mm_token_type_ids": of_image}
        case "llava" | "llama4":
            return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28)}
        case "mistral3":
            return {"input_ids": ids, "pixel_values": random(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
        case _:
            grid = torch.tensor([[1, 2, 2]])
            values = random(4, patch * vision.temporal_patch_size)
            return {"input_ids": ids, "pixel_values": values, "image_grid_thw": grid, "mm_token_type_ids": of_image}
