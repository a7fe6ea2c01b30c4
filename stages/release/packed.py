"""A packed release: its shards packed, and a manifest of what they unpack to; docs/packed.md has the format.

packed.json           the form, the base, and the size and SHA-256 of every file but the card
packed/SHARD          each shard, packed
config.json and all that is no shard, as they are
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.checkpoint.reader import SINGLE, Checkpoint
from stages.errors import ReleaseError
from stages.files import is_inner_path, is_plain_name, remove, replacing, require_free_disk, sha256, write_json
from stages.release.codec import FORMAT, pack_shard, unpack_shard
from stages.release.manifests import read_manifest_of
from stages.release.packing import SUMS, write_sums
from stages.rows import shown
from stages.sources import hub

MANIFEST = "packed.json"
FOLDER = "packed"
LARGEST = 2**63 - 1  # bytes of a file
CARD = "README.md"  # which whoever publishes may edit


@dataclass(kw_only=True)
class File:
    """size: bytes. sha256: hex."""

    size: int
    sha256: str


@dataclass(kw_only=True)
class Origin:
    """The base that masks are applied to.

    source, name, revision: where the fetch stage took it from; the revision of a hub repository is a commit. shards: name -> SHA-256.
    """

    source: str
    name: str
    revision: str | None
    shards: dict[str, str]


@dataclass(kw_only=True)
class Manifest:
    """What a packed release unpacks to.

    base: None where kept values are stored. shards: those that are packed. files: all others but the card, which are stored as they are.
    """

    format: str
    base: Origin | None
    shards: dict[str, File]
    files: dict[str, File]


def pack_release(directory: Path, base: Checkpoint | None) -> None:
    """Pack the shards of a release in place, and unpack each once to see that it comes back byte for byte.

    Args:
        directory: the release, with all its files; SHA256SUMS is written anew afterwards.
        base: to store masks alone; None: masks and values.

    Raises:
        ReleaseError: masks alone do not do; names the tensor.
    """
    shards = {name: _file(directory / name) for name in Checkpoint(directory).headers}
    files = {
        name: _file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (name := path.relative_to(directory).as_posix()) not in (*shards, CARD, SUMS)
    }
    (directory / FOLDER).mkdir()
    for name, file in shards.items():
        theirs = None if base is None else base.directory / name
        packed, again = directory / FOLDER / name, directory / f"{FOLDER}/unpacked"
        pack_shard(directory / name, packed, theirs)
        unpack_shard(packed, again, theirs, size=file.size, digest=file.sha256)
        again.unlink()
        (directory / name).unlink()
    manifest = Manifest(format=FORMAT, base=None if base is None else _origin(base), shards=shards, files=files)
    write_json(directory / MANIFEST, asdict(manifest))


def _file(path: Path) -> File:
    return File(size=path.stat().st_size, sha256=sha256(path))


def _origin(base: Checkpoint) -> Origin:
    facts = base.provenance
    shards = {name: facts["files"][name] for name in base.headers}
    return Origin(source=facts["source"], name=facts["name"], revision=facts.get("revision"), shards=shards)


def read_manifest(directory: Path) -> Manifest:
    """
    Raises:
        ReleaseError: the directory holds no packed release, or its manifest has other keys, a path out of the directory or a size below 0.
    """
    path = directory / MANIFEST
    manifest: Manifest = read_manifest_of(Manifest, path, wanted_format=FORMAT, otherwise="a packed release (publish.packed=true)")
    for name in [*manifest.shards, *(manifest.base.shards if manifest.base else ())]:
        if not (is_plain_name(name) and name.endswith(".safetensors")):
            raise ReleaseError(f"{path}: found the shard {name!r}, wanted the name of a .safetensors file")
    for name in manifest.files:
        if not is_inner_path(name) or name in (*manifest.shards, CARD, SUMS):
            raise ReleaseError(f"{path}: found the file {name!r}, wanted a path inside the release that no other file has")
    for name, file in (manifest.shards | manifest.files).items():
        if not 0 <= file.size <= LARGEST:
            raise ReleaseError(f"{path}: found a size of {shown(file.size)} for {name}, wanted 0 to {LARGEST} bytes")
    return manifest


def unpack_release(directory: Path, target: Path, base: Path | None) -> Manifest:
    """Restore the release, byte for byte.

    Args:
        directory: the packed release. target: a directory that is made, or replaced when all is done.
        base: directory of the base's shards, where masks alone are stored; None: the hub repository that the manifest names.

    Raises:
        ReleaseError: a file is missing, damaged or does not belong to the release, or the base is another; names it.
        SourceError: the base cannot be downloaded.
        SparsesweepError: the disk is full, or has not enough space: found out before anything is written.
    """
    manifest = read_manifest(directory)
    require_free_disk(target, sum(file.size for file in (manifest.shards | manifest.files).values()))
    theirs = _base_shards(manifest, target, base)
    with replacing(target) as scratch:
        for name, file in manifest.files.items():
            _copy(directory / name, scratch / name, file)
        if (directory / CARD).is_file():
            shutil.copyfile(directory / CARD, scratch / CARD)
        for name, file in manifest.shards.items():
            packed = directory / FOLDER / name
            unpack_shard(packed, scratch / name, theirs.get(name), size=file.size, digest=file.sha256)
        write_sums(scratch)
    remove(_downloads(target))
    return manifest


def _copy(source: Path, target: Path, file: File) -> None:
    actual = sha256(source) if source.is_file() else "no file"
    if actual != file.sha256:
        raise ReleaseError(f"{source}: found {actual}, wanted SHA-256 {file.sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


# The base of masks.


def _base_shards(manifest: Manifest, target: Path, base: Path | None) -> dict[str, Path]:
    """The shards of the base, compared with their hashes; none where kept values are stored."""
    origin = manifest.base
    if origin is None:
        return {}
    # the fetch stage names a single shard anew, whose name on the hub is SINGLE
    directory = base or _downloaded(origin, _downloads(target))
    shards = {name: directory / (name if len(origin.shards) > 1 or (directory / name).is_file() else SINGLE) for name in origin.shards}
    for name, path in shards.items():
        actual = sha256(path) if path.is_file() else "no file"
        if actual != origin.shards[name]:
            raise ReleaseError(f"{path}: found {actual}, wanted SHA-256 {origin.shards[name]} of the base {_named(origin)}")
    if missing := [name for name in manifest.shards if name not in shards]:
        raise ReleaseError(f"{MANIFEST}: found no shard of the base for {', '.join(missing)}, wanted one for each shard of the release")
    return shards


def _downloads(target: Path) -> Path:
    return target.with_name(f".{target.name}-base")


def _downloaded(origin: Origin, directory: Path) -> Path:
    """The base from the hub, in a directory from which a later call resumes."""
    if origin.source != "hub" or origin.revision is None:
        wanted = f"--base, a directory with the shards of {_named(origin)}"
        raise ReleaseError(f"{MANIFEST}: found masks alone, of a base that is on no hub, wanted {wanted}")
    repository = hub.resolve(origin.name, origin.revision, "model")
    names = list(origin.shards) if set(origin.shards) <= set(repository.sizes) else [SINGLE]
    hub.download(repository, names, directory)
    return directory


def _named(origin: Origin) -> str:
    return f"{origin.name}{f' at {origin.revision}' if origin.revision else f', which the source {origin.source} gives'}"


# From the hub.


def download_release(repo: str, revision: str, directory: Path) -> None:
    """Download a packed release into a directory from which a later call resumes.

    Raises:
        SourceError: the repository is not there, or a file of it. ReleaseError: it is no packed release.
    """
    repository = hub.resolve(repo, revision, "model")
    hub.download(repository, [MANIFEST], directory)
    manifest = read_manifest(directory)
    card = [CARD] if CARD in repository.sizes else []
    hub.download(repository, [*manifest.files, *card, *(f"{FOLDER}/{name}" for name in manifest.shards)], directory)
