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

from stages.errors import SparsesweepError
from stages.evaluation.journal import Journal
from stages.evaluation.metric import Corpus
from stages.files import read_json, write_json

log = logging.getLogger(__name__)

STATES, MANIFEST = "states.safetensors", "states.json"
LIMIT = 2**29  # bytes that are kept


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


def write(directory: Path, journal: Journal, fingerprint: dict[str, Any]) -> None:
    """Write what the journal has of them, perhaps nothing, and what they are of.

    Args:
        fingerprint: of the dense model's evaluation; see Setup.fingerprint.
    """
    kept = journal.move(STATES, directory)
    write_json(directory / MANIFEST, {"kept": kept, "fingerprint": _digest(fingerprint)})


def read(directory: Path, corpora: Sequence[Corpus], fingerprint: dict[str, Any]) -> list[torch.Tensor] | None:
    """The states of each corpus, or None where none were kept, or they are of another evaluation of the dense model.

    Raises:
        SparsesweepError: the file is damaged; names it.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    facts = read_json(manifest)
    if not facts.get("kept"):
        return None
    if facts.get("fingerprint") != _digest(fingerprint):
        log.info("%s is of another evaluation of the dense model, which runs again next to the pruned one", directory)
        return None
    path = directory / STATES
    try:
        tensors = load_file(path)
        return [tensors[corpus.name] for corpus in corpora]
    except (SafetensorError, OSError, KeyError) as error:
        raise SparsesweepError(f"{path}: damaged ({error}); run python -m stages.evaluate part=dense") from error


def _digest(fingerprint: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
