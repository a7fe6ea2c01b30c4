"""Small random checkpoints of multimodal models, made from their real config classes and saved by transformers."""

from typing import Any

from transformers import PretrainedConfig

from tests.streaming.test_every_model_type import FOUR_LAYERS, SMALL

# A small value -> the names that configurations of towers and projectors have for sizes.
SIZES = {
    1: "downsample_factor num_query_tokens output_dim_x",
    2: """depth encoder_layers num_hidden_layers num_layers spatial_merge_size temporal_patch_size""",
    4: """attention_heads encoder_attention_heads num_attention_heads num_heads num_key_value_heads""",
    8: "head_dim",
    14: "patch_size",
    28: "image_size",
    32: "d_model embed_dim hidden_size out_hidden_size projection_dim encoder_hidden_size",
    48: "encoder_ffn_dim ffn_dim intermediate_size",
    96: "vocab_size",
}
TOWER = {name: value for value, names in SIZES.items() for name in names.split()}
TIME_HEIGHT_WIDTH = "glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_omni_thinker qwen2_5_vl qwen2_vl".split()
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")  # tokens that no window has
def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Rotary embeddings of positions in time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **others}}


# Part of a model type -> what it wants otherwise.
OTHERWISE: dict[tuple[str, str], dict[str, Any]] = {
    ("ernie4_5_vl_moe", "text_config"): {"moe_intermediate_size": [24, 24]},
    ("gemma4", "text_config"): FOUR_LAYERS,
    ("gemma4_unified", "text_config"): FOUR_LAYERS,
    **{(kind, "text_config"): rope(2, 1, 1) for kind in TIME_HEIGHT_WIDTH},
    ("glm4v_moe", "text_config"): rope(1, 1, 0, partial_rotary_factor=0.5),
    ("hunyuan_vl", "text_config"): rope(1, 1, 1, 1),
    ("kimi_k25", "text_config"): {"num_key_value_heads": 4, "head_dim": 4},
    ("llama4", "vision_config"): {"projector_input_dim": 48, "projector_output_dim": 48, "vision_output_dim": 48},
}


def sizes(config: PretrainedConfig, table: dict[str, Any], part: str, kind: str) -> dict[str, Any]:
    stated, aliases = config.to_dict(), config.attribute_map
    known = {name: value for name, value in table.items() if name in stated or name in aliases}
    known = {name: value for name, value in known.items() if not isinstance(stated.get(name), (list, dict))}
    tokens = {name: 91 + number for number, name in enumerate(name for name in PLACEHOLDERS if name in stated)}
    return {**known, **tokens, **OTHERWISE.get((kind, part), {})}


def small(config_type: type[PretrainedConfig]) -> PretrainedConfig:
    return _small(config_type(), "", config_type.model_type)


def _small(config: PretrainedConfig, part: str, kind: str) -> PretrainedConfig:
    text = part in ("", "text_config", "llm_config", "decoder", "thinker_config.text_config")
    changed = sizes(config, SMALL if text else TOWER, part, kind)
    for name, inner in vars(config).items():
        if isinstance(inner, PretrainedConfig):
            changed[name] = _small(inner, f"{part}.{name}".strip("."), kind)
    return type(config)(**changed)
