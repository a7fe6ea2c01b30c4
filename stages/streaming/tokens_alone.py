"""Multimodal models on tokens alone: whether they run so, and which of the models that they join do not run then."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stages.streaming.architecture import unsupported

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel


def require_tokens_alone(model: "PreTrainedModel") -> None:
    """Refuse a model that cannot be called without images or the like.

    Raises:
        ArchitectureError: names what it wants.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if others := [name for name in wanted if name != "input_ids"]:
        raise unsupported(model, f"it does not run on tokens alone, it wants {' and '.join(others)}")


@contextmanager
def idle_models(model: "PreTrainedModel", blocks: str) -> Iterator[set[str]]:
    """Note which inner models do not run, such as vision encoders.

    Args:
        blocks: path of the decoder blocks, instead of which others may run.

    Yields:
        The paths of the models, each with a dot at its end; at the end of the context those that ran are not among them.
    """
    from transformers import PreTrainedModel

    inner = {name: module for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)}
    idle = {f"{name}." for name in inner if not f"{blocks}.".startswith(f"{name}.")}

    def runs(path: str) -> None:
        idle.difference_update({name for name in idle if f"{path}.".startswith(name)})

    hooks = [module.register_forward_pre_hook(lambda _, __, path=name: runs(path)) for name, module in model.named_modules()]
    try:
        yield idle
    finally:
        for hook in hooks:
            hook.remove()
