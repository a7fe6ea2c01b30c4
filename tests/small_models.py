"""Configurations with small values for all sizes, made from the real config classes of transformers."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

# A small value -> the names that configurations have for sizes.
SIZES = {
    1: "bos_token_id decoder_start_token_id first_k_dense_replace n_group num_kv_shared_layers topk_group",
    2: """eos_token_id index_n_heads linear_num_key_heads linear_num_value_heads moe_k num_experts_per_tok num_key_value_heads
    linear_num_heads top_k_experts""",
    3: """decoder_layers encoder_layers mask_token_id n_layer n_layers num_decoder_layers num_encoder_layers num_hidden_layers
    num_layers""",
    4: """decoder_attention_heads encoder_attention_heads laurel_rank mamba_d_state mamba_n_heads mamba_num_heads moe_num_experts n_head
    n_heads n_routed_experts num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts num_heads
    num_local_experts prompt_length prompt_types qk_nope_head_dim qk_rope_head_dim rotary_dim segment_types ssm_state_size state_size""",
    8: """attention_chunk_size attention_window dim_head head_dim hidden_size_per_layer_input index_head_dim index_topk kv_lora_rank
    linear_head_dim linear_key_head_dim linear_value_head_dim o_lora_rank qk_head_dim
    query_pre_attn_scalar sliding_window v_head_dim window_size""",
    12: "q_lora_rank",
    16: "mamba_d_head mamba_head_dim",
    24: "expert_ffn_hidden_size expert_intermediate_size moe_intermediate_size",
    32: "attention_hidden_size d_model dim_model emb_dim embedding_size hidden_size lru_width n_embd word_embed_proj_dim",
    40: "moe_shared_expert_intermediate_size shared_expert_intermediate_size",
    48: """d_ff decoder_ffn_dim dff dim_ff encoder_ffn_dim ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp n_inner
    shared_intermediate_size""",
    64: "block_size max_position_embeddings max_seq_len n_ctx n_positions original_max_position_embeddings",
    96: "vocab_size vocab_size_per_layer_input",
}
SMALL = {"pad_token_id": 0} | {name: value for value, names in SIZES.items() for name in names.split()}
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
AS_MANY_KEYS = {"num_key_value_heads": 4}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Model type of a whole model or of its text decoder -> what it wants otherwise.
OF_TEXT: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4, "head_dim": 4},
    "axk2": AS_MANY_KEYS,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 3, "rope_parameters": {"full_attention": DEFAULT_ROPE}},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v32": AS_MANY_KEYS,
    "dots3_note_text": {
        **AS_MANY_KEYS,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "per_layer_config": {},
        "shared_experts_intermediate_size": 24,
    },
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **FOUR_LAYERS,
        "altup_num_inputs": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**FOUR_LAYERS, "enable_moe_block": True},
    "gemma4_unified_text": FOUR_LAYERS,
    "glm4_moe_lite": AS_MANY_KEYS,
    "glm_moe_dsa": AS_MANY_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},  # the second layer has experts
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4, "zero_expert_num": 2},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local"] * 3},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4, "head_dim": 4, "pad_token_id": None},  # transformers overwrites what it loads for that token
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],  # of which two hold the same matrices
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_ngroups": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# A small value -> the names that configurations of encoders and projectors have for sizes.
ENCODER_SIZES = {
    2: "depth encoder_layers num_hidden_layers num_layers spatial_merge_size temporal_patch_size",
    4: "attention_heads encoder_attention_heads num_attention_heads num_heads num_key_value_heads",
    8: "head_dim",
    14: "patch_size",
    28: "image_size",
    32: "d_model embed_dim encoder_hidden_size hidden_size out_hidden_size projection_dim",
    48: "encoder_ffn_dim ffn_dim intermediate_size",
    96: "vocab_size",
}
ENCODER = {name: value for value, names in ENCODER_SIZES.items() for name in names.split()}
TIME_HEIGHT_WIDTH = "cosmos3_edge glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_omni_thinker qwen2_5_vl qwen2_vl"
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")  # tokens that no window has
PLACEHOLDER = 91


def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Rotary embeddings of positions in time, height and width."""
    return {"rope_parameters": {**DEFAULT_ROPE, "mrope_section": list(sections), **others}}


# Model type of a whole model, part of its configuration -> what it wants otherwise.
OF_PART: dict[tuple[str, str], dict[str, Any]] = {
    **{(kind, "text_config"): rope(2, 1, 1) for kind in TIME_HEIGHT_WIDTH.split()},
    ("blt", ""): {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    ("dbrx", "attn_config"): {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    ("dbrx", "ffn_config"): {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ("dots3_note", "vision_config"): {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    ("dots3_note", "audio_config"): {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8, "conv_output_size": 128},
    ("fun_asr_nano", "adaptor_config"): {"intermediate_size": 8},
    ("gemma3", ""): {"mm_tokens_per_image": 4},
    ("gemma4", ""): {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2, "position_embedding_size": 8, **ENCODER}},
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
TEXT = ("", "text_config", "decoder")


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
    changed |= _kinds_of_layers(config, stated) | OF_TEXT.get(config.model_type, {}) if part in TEXT else {}
    return type(config)(**changed | OF_PART.get((kind, part), {}))


def _kinds_of_layers(config: PretrainedConfig, stated: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that a configuration has by default, where its first layers are not of all kinds, as in most hybrids."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: value for name, value in stated.items() if name.endswith("layer_types") and value and len(value) == count}
    layers = list(zip(*lists.values(), strict=True))
    kinds = list(dict.fromkeys(layers))
    if len(kinds) == len(set(layers[: SMALL["num_hidden_layers"]])):
        return {}
    kinds += kinds[-1:] * (SMALL["num_hidden_layers"] - len(kinds))
    return {"num_hidden_layers": len(kinds)} | dict(zip(lists, map(list, zip(*kinds, strict=True)), strict=True))
