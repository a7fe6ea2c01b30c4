"""Which checkpoints are accepted, seen from config.json before any weight is downloaded."""

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from stages.errors import SourceError


def require_decoder(config: Any, where: str) -> None:
    """Refuse a checkpoint that is not a plain decoder language model that transformers knows without foreign code.

    Args:
        config: what config.json holds. where: for the error.

    Raises:
        SourceError: naming what config.json says.
    """
    if not isinstance(config, dict):
        raise SourceError(f"{where}: found {type(config).__name__} in config.json, wanted an object with model_type")
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if config.get("quantization_config"):
        raise SourceError(f"{where}: found weights quantised by {_quantiser(config)!r}, wanted 16- or 32-bit floats")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise SourceError(f"{where}: model_type {kind!r} is unknown to transformers, and code of a repository is not run")
    known = CONFIG_MAPPING[kind]
    if config.get("is_encoder_decoder", getattr(known, "is_encoder_decoder", False)):
        raise SourceError(f"{where}: {architectures or kind} is an encoder-decoder, wanted a decoder language model")
    if models := _inner_models(known):
        raise SourceError(
            f"{where}: {architectures or kind} joins several models ({', '.join(models)}), wanted one decoder; "
            "the text decoder of a multimodal checkpoint is not supported yet"
        )
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(known, None)
    if model is None or model.__name__ not in architectures:
        wanted = "a decoder language model" if model is None else model.__name__
        raise SourceError(f"{where}: found architecture {architectures} of type {kind!r}, wanted {wanted}")


def _quantiser(config: dict[str, Any]) -> Any:
    stated = config["quantization_config"]
    return stated.get("quant_method") if isinstance(stated, dict) else stated


def _inner_models(config: type) -> list[str]:
    """Keys of a configuration class that hold the configuration of another model, such as a vision encoder or the text decoder.

    A decoder's own settings may be nested, too, such as those of its attention: they are of no model that transformers lists.
    """
    nested: dict[str, type] = getattr(config, "sub_configs", {})
    return [key for key, inner in nested.items() if inner is AutoConfig or getattr(inner, "model_type", None) in CONFIG_MAPPING]
