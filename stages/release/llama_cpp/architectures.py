"""What llama.cpp calls the architectures of transformers, and what it computes otherwise than they do.

    llama, mistral    q and k are rotated in neighbouring pairs (2i, 2i + 1) of a head, not in its halves (i, i + d/2): their rows are
                      reordered, which leaves q k^T as it is
    gemma3_text       a norm multiplies by its gain g, not by 1 + g: 1 is added
    llama 3           factors of the rotary frequencies are a tensor of their own

An architecture is taken only with the values of its config that llama.cpp computes with.
github.com/ggml-org/llama.cpp, src/models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stages.errors import ArchitectureError

SLIDING_BLOCKS = 6  # gemma3: every sixth block attends to all tokens
SLIDING_THETA = 10000.0  # gemma3: the base of the rotary frequencies in the other blocks

Fixed = Callable[[Any], dict[str, tuple[Any, Any]]]  # config -> key -> value found, value wanted


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp.

    model: llama.cpp's.
    fixed: of a config, the values that llama.cpp has no parameter for.
    pairs: whether the rows of q and k are reordered.
    norm_offset: added to the gains of norms.
    """

    model: gguf.MODEL_ARCH
    fixed: Fixed
    pairs: bool = False
    norm_offset: float = 0.0

    def require(self, config: Any) -> None:
        """
        Raises:
            ArchitectureError: a value of the config is none that llama.cpp computes with; names the architecture and the key.
        """
        for key, (found, wanted) in {**self.fixed(config), **_rotary(config)}.items():
            if found != wanted:
                subject = f"{config.model_type} as GGUF"
                raise ArchitectureError(f"{subject}: found {key} {found!r}, wanted {wanted!r}, with which llama.cpp computes")


def _rotary(config: Any) -> dict[str, tuple[Any, Any]]:
    kind = rotary(config)["rope_type"]
    return {"rope_type": (kind, kind if kind == "llama3" else "default"), "partial_rotary_factor": (partial(config), 1.0)}


def partial(config: Any) -> float:
    """The share of a head that is rotated."""
    return rotary(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0


def rotary(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding, of the blocks that attend to all tokens."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _llama(config: Any) -> dict[str, tuple[Any, Any]]:
    biases = {key: (getattr(config, key, False), False) for key in ("attention_bias", "mlp_bias")}
    return {"hidden_act": (config.hidden_act, "silu"), **biases}


def _qwen(config: Any) -> dict[str, tuple[Any, Any]]:
    biased = {"attention_bias": (getattr(config, "attention_bias", False), False)}
    return {"hidden_act": (config.hidden_act, "silu"), "use_sliding_window": (config.use_sliding_window, False), **biased}


def _gemma3(config: Any) -> dict[str, tuple[Any, Any]]:
    blocks = range(1, config.num_hidden_layers + 1)
    sliding = config.rope_parameters["sliding_attention"]
    return {
        "hidden_activation": (config.hidden_activation, "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, config.head_dim),
        "attn_logit_softcapping": (config.attn_logit_softcapping, None),
        "final_logit_softcapping": (config.final_logit_softcapping, None),
        "use_bidirectional_attention": (bool(config.use_bidirectional_attention), False),
        "attention_bias": (config.attention_bias, False),
        "layer_types": (list(config.layer_types), ["sliding_attention" if i % SLIDING_BLOCKS else "full_attention" for i in blocks]),
        "rope_theta of sliding_attention": (float(sliding["rope_theta"]), SLIDING_THETA),
        "rope_type of sliding_attention": (sliding["rope_type"], "default"),
    }


ARCHITECTURES = {
    "llama": Architecture(model=gguf.MODEL_ARCH.LLAMA, fixed=_llama, pairs=True),
    "mistral": Architecture(model=gguf.MODEL_ARCH.LLAMA, fixed=_llama, pairs=True),
    "qwen2": Architecture(model=gguf.MODEL_ARCH.QWEN2, fixed=_qwen),
    "qwen3": Architecture(model=gguf.MODEL_ARCH.QWEN3, fixed=_qwen),
    "gemma3_text": Architecture(model=gguf.MODEL_ARCH.GEMMA3, fixed=_gemma3, norm_offset=1.0),
}


def architecture_of(config: Any) -> Architecture:
    """llama.cpp's architecture for a config of transformers.

    Raises:
        ArchitectureError: there is none here, or the config has a value that llama.cpp does not compute with; names both.
    """
    if config.model_type not in ARCHITECTURES:
        wanted = f"wanted one of {', '.join(ARCHITECTURES)}; leave gguf out of publish.formats"
        raise ArchitectureError(f"publish.formats: found gguf of the architecture {config.model_type}, {wanted}")
    architecture = ARCHITECTURES[config.model_type]
    architecture.require(config)
    return architecture


def head_length(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_parameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what llama.cpp needs of a config."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_length(config))
    writer.add_value_length(head_length(config))
    writer.add_rope_dimension_count(head_length(config))
    writer.add_rope_freq_base(float(rotary(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def rotary_factors(config: Any) -> torch.Tensor | None:
    """By what llama.cpp divides the rotary frequencies, [head_length / 2], float32; None: by 1."""
    kind = rotary(config)["rope_type"]
    if kind == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    length = head_length(config)
    plain = 1.0 / rotary(config)["rope_theta"] ** (torch.arange(0, length, 2, dtype=torch.float32) / length)
    return plain / scaled


def to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k from halves of each head to neighbouring pairs: i, i + d/2 -> 2i, 2i + 1.

    Args:
        rows: [heads * d, ...].
    """
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of to_pairs."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def heads_in_pairs(architecture: Architecture, config: Any) -> Iterator[tuple[str, int]]:
    """Ends of the names of tensors whose rows are reordered, each with its heads."""
    if architecture.pairs:
        yield ".q_proj.weight", config.num_attention_heads
        yield ".k_proj.weight", config.num_key_value_heads
