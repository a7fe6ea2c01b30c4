"""Is the written release what it should be? Measured on its own bytes and in stock transformers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.errors import ReleaseError

PROBE_TOKENS = 32


@dataclass(kw_only=True, slots=True)
class Verified:
    """What the checks found.

    sparsity: fraction of zeros in the bytes of the matrices in scope; above the sparsity asked for where kept weights were
        zero before, or became zero when they were rounded.
    """

    matrices: int
    other_tensors: int
    sparsity: float


def verify(release: Path, base: Checkpoint, delta: SparseDelta) -> Verified:
    """Check every tensor, then load the release in stock transformers and compare its logits with base + delta.

    Raises:
        ReleaseError: names the tensor or the check that failed.
    """
    written = Checkpoint(release)
    found = _check_tensors(written, base, delta)
    _check_loading(release, base, delta)
    return found


def _check_tensors(written: Checkpoint, base: Checkpoint, delta: SparseDelta) -> Verified:
    if set(written) != set(base):
        raise ReleaseError(f"{written.directory}: found tensors {sorted(set(written) ^ set(base))[:3]} on one side only")
    asked: Counter[str] = Counter()
    for row in delta.matrices:
        asked[row["tensor"]] += row["zeros"]
    if not set(delta) == set(asked) <= set(base):
        odd = sorted(set(delta) ^ set(asked)) or sorted(set(asked) - set(base))
        raise ReleaseError(f"{delta.directory}: its files, its manifest and the base do not have the same matrices: {odd[:3]}")
    zeros = weights = 0
    for name in tqdm(base, desc="checking tensors", unit="tensor", disable=None):
        before, after = base.tensor(name), written.tensor(name)
        if name not in delta:
            if not _same_bits(before, after):
                raise ReleaseError(f"{name}: out of scope, yet its bits differ from the base's")
            continue
        change = delta.change(name)
        zero = after == 0
        if not zero[~change.mask].all() or int((~change.mask).sum()) != asked[name]:
            raise ReleaseError(f"{name}: found {int(zero.sum())} zeros, wanted the {asked[name]} of the mask")
        if change.values is None and not _same_bits(change.reorder(before)[change.mask], after[change.mask]):
            raise ReleaseError(f"{name}: its kept weights differ from the base's")
        zeros, weights = zeros + int(zero.sum()), weights + zero.numel()
    return Verified(matrices=len(delta.matrices), other_tensors=len(set(base)) - len(asked), sparsity=zeros / weights)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@torch.no_grad()
def _check_loading(release: Path, base: Checkpoint, delta: SparseDelta) -> None:
    stock, report = AutoModelForCausalLM.from_pretrained(release, dtype="auto", output_loading_info=True)
    problems = {key: sorted(found) for key, found in report.items() if found and key.endswith("_keys")}
    if problems:
        raise ReleaseError(f"{release}: stock transformers reports {problems}")
    config = stock.config
    if getattr(config, "quantization_config", None) or getattr(config, "sparsity_config", None):
        raise ReleaseError(f"{release}: its config names a quantisation or sparsity format, wanted the base's plain config")
    output, inputs = stock.get_output_embeddings(), stock.get_input_embeddings()
    if getattr(config, "tie_word_embeddings", False) and output.weight.data_ptr() != inputs.weight.data_ptr():
        raise ReleaseError(f"{release}: the output embedding is no longer tied to the input's")
    probe = torch.arange(1, PROBE_TOKENS + 1)[None] % config.vocab_size
    logits, dtype = stock.eval()(input_ids=probe).logits, stock.dtype
    del stock, output, inputs  # two models of 7B do not fit where one does
    ours = load_model(base, delta.apply, dtype=dtype, device=torch.device("cpu"))
    if not torch.equal(logits, ours(input_ids=probe).logits):
        raise ReleaseError(f"{release}: logits in stock transformers differ from those of base + delta")
