"""Every model type that transformers has a language model for: streamed as the whole model computes, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, CheckpointError
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
BATCH = 2

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
    linear_head_dim linear_key_head_dim linear_value_head_dim qk_head_dim query_pre_attn_scalar sliding_window v_head_dim window_size""",
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

# Model type -> what it wants otherwise.
OTHERWISE = {
    "axk1": {"num_key_value_heads": 4, "head_dim": 4},
    "axk2": AS_MANY_KEYS,
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v32": AS_MANY_KEYS,
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **FOUR_LAYERS,
        "altup_num_inputs": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": FOUR_LAYERS,
    "gemma4_unified_text": FOUR_LAYERS,
    "glm4_moe_lite": AS_MANY_KEYS,
    "glm_moe_dsa": AS_MANY_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4, "zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local"] * 3},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4, "head_dim": 4, "pad_token_id": None},  # transformers overwrites what it loads for that token
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_ngroups": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
NOT_SMALL = {  # whose sizes depend on each other in more ways, or that are large whatever their text model's sizes
    *("blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3", "gemma3n", "gemma4", "gemma4_assistant"),
    *("gemma4_unified", "git", "got_ocr2", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "zamba"),
}

# Why it is refused -> model types.
REFUSED = {
    "block 0 does not receive hidden states as its first argument": "reformer",
    "wanted [windows, tokens, ...]": "cpmant prophetnet xlnet",
    "groups of rows, each with inputs of its own, wanted rows with the same inputs": "deepseek_v4",
    "holds other numbers of experts in its parameters": "longcat_flash",
    "it does not run on tokens alone": "gemma4_unified_assistant",
    "wanted one list of decoder blocks": "hrm_text xlm",
    "wanted matrices that are joined by rows, or experts that are stacked": "inkling2_text",
    "transformers knows no decoder language model of type": "emu3 mllama",
}
REASONS = {kind: reason for reason, kinds in REFUSED.items() for kind in kinds.split()}
TYPES = {config.model_type: config for config in reversed(list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()))}
BUILT = sorted(set(TYPES) - NOT_SMALL)


def sizes(config: PretrainedConfig) -> dict[str, object]:
    """Small values for all that a configuration has."""
    stated, aliases = config.to_dict(), config.attribute_map
    known = {name: value for name, value in SMALL.items() if name in stated or name in aliases}
    known = {name: value for name, value in known.items() if not isinstance(stated.get(name), (list, dict))}
    return {**known, **OTHERWISE.get(config.model_type, {})}


def small(config_type: type[PretrainedConfig]) -> PretrainedConfig:
    default = config_type()
    parts = {name: getattr(default, name, None) for name in ("text_config", "decoder")}
    return config_type(**sizes(default), **{name: type(part)(**sizes(part)) for name, part in parts.items() if part is not None})


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
    decoder = Decoder(write(tmp_path, small(TYPES[kind])), torch.float32, CPU)
    assert all(decoder.matrices)
    assert torch.equal(streamed_logits(decoder), whole_logits(tmp_path))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [kind for kind in BUILT if kind in REASONS])
def test_a_model_that_is_not_run_block_by_block_is_refused_with_the_reason_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    checkpoint = write(tmp_path, small(TYPES[kind]))
    monkeypatch.setattr(Checkpoint, "tensor", None)
    with pytest.raises((ArchitectureError, CheckpointError)) as error:
        _ = Decoder(checkpoint, torch.float32, CPU).matrices
    assert REASONS[kind] in str(error.value)
