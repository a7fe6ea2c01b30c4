"""Small random checkpoints of many architectures, made from their real config classes and saved by transformers."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**SIZES, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}

LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
SHARING = {**SIZES, **LAYERS, "head_dim": 8, "sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}

# model type -> what differs from its defaults
CONFIGS: dict[str, dict] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 8},
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, **SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SIZES, **SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": SIZES,
    "phi3": SIZES,
    "gpt2": GPT2,
    "gpt_neo": {
        **SIZES,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "gptj": {**GPT2, "rotary_dim": 4},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bart": {
        **{"vocab_size": 96, "d_model": 32, "decoder_layers": 3, "encoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
        **{"is_encoder_decoder": False, "is_decoder": True},  # as its causal language model writes them
    },
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {**SIZES, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "cohere": SIZES,
    "cohere2": {**SIZES, **SLIDING},
    "olmo": SIZES,
    "olmo2": SIZES,
    "olmo3": {**SIZES, **SLIDING},
    "granite": SIZES,
    "smollm3": SIZES,
    "glm4": {**SIZES, "head_dim": 8},
    "nemotron": SIZES,
    "codegen": {**GPT2, "rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "arcee": SIZES,
    "exaone4": {**SIZES, "sliding_window": 8},
    "seed_oss": {**SIZES, "head_dim": 8},
    "ernie4_5": SIZES,
    "persimmon": SIZES,
    "openai-gpt": GPT2,
    "phimoe": {**SIZES, "num_local_experts": 4},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **LATENT_ATTENTION,
    },
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    "mamba2": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 2},
    "jamba": {**SIZES, "num_experts": 4, "mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {**SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "head_dim": 8},
    "granitemoehybrid": {
        **EXPERTS,
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 4,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "qwen3_next": {**EXPERTS, **LINEAR_ATTENTION, "num_experts": 4, "shared_expert_intermediate_size": 40, "head_dim": 8},
    "qwen3_5_text": {**SIZES, **LINEAR_ATTENTION, "head_dim": 8},
    "lfm2_moe": {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["full_attention", "conv", "full_attention"]},
    "recurrent_gemma": {**SIZES, "lru_width": 32, "head_dim": 8, "attention_window_size": 8},
    "rwkv": {"vocab_size": 96, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    "bamba": {**SIZES, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "attn_layer_indices": [1]},
    "zamba2": {  # two of its blocks hold the same attention and MLP
        **SIZES,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 4,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
    },
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    "jetmoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "glm_moe_dsa": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **LATENT_ATTENTION,
        "index_topk": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "gemma4_text": SHARING,
    "gemma3n_text": {
        **SHARING,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}

# What is refused, and why.
REFUSED: dict[str, tuple[dict, str]] = {
    "cpmant": (
        {**SIZES, "dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
        "its blocks receive hidden states of shape [1, 6, 32] for [1, 2] tokens, wanted [windows, tokens, ...]",
    ),
    "prophetnet": (
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_decoder_layers": 3,
            "num_encoder_layers": 3,
            "num_decoder_attention_heads": 4,
            "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_ffn_dim": 48,
            "is_encoder_decoder": False,
            "add_cross_attention": False,
        },
        "its blocks receive hidden states of shape [1, 6, 32] for [1, 2] tokens, wanted [windows, tokens, ...]",
    ),
}


def model(kind: str, seed: int = 0) -> PreTrainedModel:
    """With weights large enough for attention and routing to tell tokens apart, norms and biases included."""
    return made(AutoConfig.for_model(kind, **(CONFIGS.get(kind) or REFUSED[kind][0])), seed)


def made(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same of any configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model.to(torch.bfloat16)


def write(directory: Path, kind: str) -> Path:
    model(kind).save_pretrained(directory, max_shard_size="30KB")
    return directory
