"""The dense model's hidden states on the windows of an evaluation, kept for all pruned models that are compared with it.

A divergence sets the pruned model against the dense one token by token. Of a sweep's points only the pruned one differs: the outputs of
the dense model's last block are kept where they are small, and only its head runs again for each point. They have no vocabulary's size.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stages.devices import cpu_name, device_name
from stages.errors import SparsesweepError
from stages.evaluation.journal import Journal
from stages.evaluation.metric import Corpus
from stages.files import read_json, write_json
from stages.rows import shown

log = logging.getLogger(__name__)

STATES, MANIFEST = "states.safetensors", "states.json"
LIMIT = 2**29  # bytes that are kept
ADVICE = "run python -m stages.evaluate part=dense"


def keep(journal: Journal, corpora: Sequence[Corpus], states: Sequence[torch.Tensor]) -> None:
    """Add the states to the journal of the dense model's evaluation, unless they are too large.

    Args:
        states: of each corpus, [windows, tokens, width], compute dtype.
    """
    size = sum(tensor.nbytes for tensor in states)
    if size <= LIMIT:
        journal.write_tensors({corpus.name: tensor.cpu() for corpus, tensor in zip(corpora, states, strict=True)}, STATES)
    else:
        words = "hidden states of %.1f GB are not kept, at most %.1f GB are: the dense model runs again for each pruned one"
        log.info(words, size / 1e9, LIMIT / 1e9)


def write(directory: Path, journal: Journal, fingerprint: dict[str, Any], device: torch.device) -> None:
    """Write what the journal has of them, perhaps nothing, and what they are of.

    Args:
        fingerprint: of the dense model's evaluation; see Setup.fingerprint. device: on which it ran.
    """
    kept = journal.copy(STATES, directory)
    write_json(directory / MANIFEST, {"kept": kept, **_origin(fingerprint, device)})


def read(directory: Path, corpora: Sequence[Corpus], fingerprint: dict[str, Any], device: torch.device) -> list[torch.Tensor] | None:
    """The states of each corpus, or None where none were kept, or they are of another evaluation of the dense model or another device:
    two that round otherwise would seem to diverge.

    Raises:
        SparsesweepError: a file is damaged; names it.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    facts = read_json(manifest)
    if not isinstance(facts, dict):
        raise SparsesweepError(f"{manifest}: damaged (found {shown(facts)}, wanted an object); {ADVICE}")
    if facts.get("kept") is not True:
        return None
    if any(facts.get(key) != value for key, value in _origin(fingerprint, device).items()):
        log.warning("%s is of another evaluation of the dense model, or another device: it runs again next to the pruned one", directory)
        return None
    path = directory / STATES
    try:
        tensors = load_file(path)
        found = [tensors[corpus.name] for corpus in corpora]
    except (SafetensorError, OSError, KeyError) as error:
        raise SparsesweepError(f"{path}: damaged ({error}); {ADVICE}") from None
    for corpus, tensor in zip(corpora, found, strict=True):
        if tensor.dim() != 3 or tensor.shape[:2] != corpus.windows.shape or not tensor.is_floating_point():
            wanted = f"{list(corpus.windows.shape)} and a width, floating point"
            raise SparsesweepError(
                f"{path}: damaged (found {list(tensor.shape)} of {corpus.name}, {tensor.dtype}, wanted {wanted}); {ADVICE}"
            )
    return found


def _origin(fingerprint: dict[str, Any], device: torch.device) -> dict[str, str]:
    """What the states are of. Of the code nothing: DVC binds them to that, as it does the dense model's results."""
    facts = {key: value for key, value in fingerprint.items() if key != "code"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": digest, "device": device_name(device) if device.type == "cuda" else cpu_name()}
