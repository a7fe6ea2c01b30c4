"""Puts the linear layers of a loaded release into the layout of a kernel, and says which were left dense and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from stages.errors import ReleaseError
from stages.release.kernels import macko, semi_structured
from stages.release.loading import load_stock, require_auto_class
from stages.release.zeros import plain_checkpoint, read_zeros

Kernel = Literal["semi_structured", "macko"]
KERNELS = get_args(Kernel)
PROBE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    layers: names of the modules. left: name -> why it stays dense. dense, converted: bytes of the weights of the converted layers.
    """

    layers: list[str]
    left: dict[str, str]
    dense: int
    converted: int


@torch.no_grad()
def convert(model: PreTrainedModel, kernel: Kernel) -> Conversion:
    """Convert every torch.nn.Linear with zeros, in place; a layer at a time.

    Raises:
        ReleaseError: the model's dtype is not one that the kernel takes.
    """
    if kernel == "macko" and model.dtype != macko.DTYPE:
        raise ReleaseError(f"macko: found a model of {model.dtype}, wanted {macko.DTYPE}; load it with dtype=torch.float16")
    layers, left, dense, converted = list[str](), dict[str, str](), 0, 0
    linears = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    for name, linear in linears:
        if not (linear.weight == 0).any():
            continue  # was never pruned
        size = linear.weight.nbytes
        found = _converted(linear, kernel)
        if isinstance(found, str):
            left[name] = found
            continue
        module, bytes_now = found
        model.set_submodule(name, module)
        layers.append(name)
        dense, converted = dense + size, converted + bytes_now
    return Conversion(layers=layers, left=left, dense=dense, converted=converted)


def _converted(linear: torch.nn.Linear, kernel: Kernel) -> tuple[torch.nn.Module, int] | str:
    """The layer that takes its place and the bytes of its weight; or why there is none."""
    if kernel == "macko":
        layer = macko.Macko(linear.weight, linear.bias)
        return (layer, layer.nbytes) if layer.nbytes < linear.weight.nbytes else "too few zeros: its bytes would not be fewer"
    if (reason := semi_structured.reason_against(linear.weight)) is not None:
        return reason
    parts = semi_structured.SemiStructured(linear.weight, linear.bias)
    return (semi_structured.on_cuda(linear) if linear.weight.is_cuda else parts), parts.nbytes


@dataclass(frozen=True, kw_only=True)
class Check:
    """A conversion of a whole release on a CPU.

    equal: whether the logits of 32 tokens are those of the dense model, bit for bit.
    changed: weights that have another value in the kernel's dtype than in the release's.
    """

    conversion: Conversion
    equal: bool
    changed: int


@torch.no_grad()
def check(release: Path, kernel: Kernel) -> Check:
    """Load a release in stock transformers, convert it, and compare its logits with those before.

    Raises:
        ReleaseError: no release, or a packed one; or it has no layer that the kernel takes.
    """
    read_zeros(release)
    plain_checkpoint(release)
    model = load_stock(require_auto_class(release), release)
    changed = 0
    if kernel == "macko":
        stored = {name: parameter.detach() for name, parameter in model.named_parameters()}
        changed = sum(int((weight.to(macko.DTYPE).to(weight.dtype) != weight).sum()) for weight in stored.values())
        model = model.to(macko.DTYPE)
    probe = torch.arange(1, PROBE_TOKENS + 1)[None] % model.config.get_text_config().vocab_size
    before = model(input_ids=probe).logits
    conversion = convert(model, kernel)
    if not conversion.layers:
        reasons = "; ".join(sorted(set(conversion.left.values()))) or "no linear layer has zeros"
        raise ReleaseError(f"{release}: found no layer that {kernel} takes ({reasons})")
    return Check(conversion=conversion, equal=torch.equal(model(input_ids=probe).logits, before), changed=changed)
