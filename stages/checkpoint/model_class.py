"""Which class of transformers a checkpoint is of: a decoder language model, or a multimodal model, whose text decoder is one.

The class is the one that config.json names in its architectures, if transformers lists it as a model that generates text.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def inner_models(config: type) -> list[str]:
    """Keys of a configuration class for the configuration of another model, such as a vision encoder or the text decoder.

    Nested settings of the decoder itself, such as those of its attention, are left out: transformers lists no model for them.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    nested: dict[str, type] = getattr(config, "sub_configs", {})
    return [key for key, inner in nested.items() if inner is AutoConfig or getattr(inner, "model_type", None) in CONFIG_MAPPING]


def listed_classes(config: type) -> dict[str, "type[_BaseAutoModelClass]"]:
    """The classes that generate text from this configuration: name -> the auto class of transformers that loads it.

    Of several auto classes the one for multimodal models comes first where the configuration is that of several models.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    multimodal: list[Any] = [
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    ]
    causal: list[Any] = [(MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM)]
    listed: dict[str, type[_BaseAutoModelClass]] = {}
    for mapping, auto_class in multimodal + causal if inner_models(config) else causal + multimodal:
        if config in mapping:
            listed.setdefault(mapping[config].__name__, auto_class)
    return listed


def auto_class_of(config: "PretrainedConfig") -> "type[_BaseAutoModelClass] | None":
    """The auto class that loads a checkpoint of this configuration as the class that it names; None: transformers lists none.

    A configuration that names no class is of the first that is listed.
    """
    listed = listed_classes(type(config))
    named = [listed[name] for name in config.architectures or listed if name in listed]
    return named[0] if named else None


def text_decoder(model: "PreTrainedModel") -> "nn.Module":
    """The part of a model that generates text: what a multimodal model calls its decoder, or else the whole model."""
    return model.get_decoder() if inner_models(type(model.config)) else model


def joined_parts(model: "PreTrainedModel") -> list[str]:
    """The parts of a multimodal model other than its text decoder and its output embedding, such as a vision encoder, by path."""
    decoder, head = text_decoder(model), model.get_output_embeddings()
    holders = [(name, module) for name, module in model.named_modules() if any(inner is decoder for inner in module.modules())]
    outside = [(name, module) for name, module in holders if module is not decoder]
    children = [(f"{name}.{child}".strip("."), part) for name, module in outside for child, part in module.named_children()]
    on_the_path = {id(module) for _, module in holders} | {id(head)}
    return [path for path, part in children if id(part) not in on_the_path and any(True for _ in part.parameters())]
