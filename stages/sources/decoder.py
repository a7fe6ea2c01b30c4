"""Accept or refuse a checkpoint by its config.json, before any weight is downloaded."""

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from stages.errors import SourceError
from stages.rows import shown


def require_decoder(config: Any, location: str) -> None:
    """Refuse a checkpoint that is not a single decoder language model that transformers implements itself.

    Args:
        config: the content of config.json. location: name of the checkpoint, for the error.

    Raises:
        SourceError: names the entries of config.json for which the checkpoint is refused.
    """
    if not isinstance(config, dict):
        raise SourceError(f"{location}: found {type(config).__name__} in config.json, wanted an object with model_type")
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise SourceError(f"{location}: found {shown(architectures)} as architectures in config.json, wanted a list of names")
    if config.get("quantization_config"):
        raise SourceError(f"{location}: found weights quantised by {_quantiser(config)!r}, wanted 16- or 32-bit floats")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise SourceError(f"{location}: model_type {kind!r} is unknown to transformers, and code of a repository is not run")
    config_class = CONFIG_MAPPING[kind]
    if config.get("is_encoder_decoder", getattr(config_class, "is_encoder_decoder", False)):
        raise SourceError(f"{location}: {architectures or kind} is an encoder-decoder, wanted a decoder language model")
    if models := _inner_models(config_class):
        raise SourceError(
            f"{location}: {architectures or kind} joins several models ({', '.join(models)}), wanted one decoder; "
            "the text decoder of a multimodal checkpoint is not supported yet"
        )
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if model is None or model.__name__ not in architectures:
        expected = "a decoder language model" if model is None else model.__name__
        raise SourceError(f"{location}: found architecture {architectures} of type {kind!r}, wanted {expected}")


def _quantiser(config: dict[str, Any]) -> Any:
    quantization_config = config["quantization_config"]
    return quantization_config.get("quant_method") if isinstance(quantization_config, dict) else quantization_config


def _inner_models(config: type) -> list[str]:
    """Keys of a configuration class for the configuration of another model, such as a vision encoder or the text decoder.

    Nested settings of the decoder itself, such as those of its attention, are left out: transformers lists no model for them.
    """
    nested: dict[str, type] = getattr(config, "sub_configs", {})
    return [key for key, inner in nested.items() if inner is AutoConfig or getattr(inner, "model_type", None) in CONFIG_MAPPING]
