"""Accept or refuse a checkpoint by its config.json, before any weight is downloaded."""

from typing import Any

from transformers import CONFIG_MAPPING

from stages.checkpoint.model_class import listed_classes
from stages.errors import SourceError
from stages.rows import shown


def require_decoder(config: Any, location: str) -> None:
    """Refuse a checkpoint that is no decoder language model, alone or joined with others to a multimodal model, of transformers itself.

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
    if _is_encoder_decoder(config, config_class):
        raise SourceError(f"{location}: {architectures or kind} is an encoder-decoder, wanted a decoder language model")
    listed = listed_classes(config_class)
    if not set(listed) & set(architectures):
        expected = " or ".join(listed) or "a decoder language model"
        raise SourceError(f"{location}: found architecture {architectures} of type {kind!r}, wanted {expected}")


def _is_encoder_decoder(config: dict[str, Any], config_class: type) -> bool:
    """Whether the model, or the language model that a multimodal one joins with others, reads its text by an encoder."""
    if config.get("is_encoder_decoder", getattr(config_class, "is_encoder_decoder", False)):
        return True
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return False
    kind = inner.get("model_type")
    default = isinstance(kind, str) and kind in CONFIG_MAPPING and getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False)
    return bool(inner.get("is_encoder_decoder", default))


def _quantiser(config: dict[str, Any]) -> Any:
    quantization_config = config["quantization_config"]
    return quantization_config.get("quant_method") if isinstance(quantization_config, dict) else quantization_config
