"""The files of a revision, found without DVC where they lie in git's objects or in DVC's cache.

DVC parses the whole pipeline of every revision of which it reads a file, which takes most of a second. The lock of the revision says the
hash of each output, and the cache has it by that name. What the cache has not, DVC reads, from a remote.
"""

import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.index import DataIndexDirError

from stages.errors import SparsesweepError
from stages.experiments.lock import object_of, read_lock
from stages.files import parsed_json

CLIENT_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("asyncssh", "Error"))  # what clients raise that is no OSError
DIRECTORY = ".dir"  # suffix of a list of the files of a directory


class Unreadable(Exception):
    """A state of the project that is not an evaluated experiment, or not all of one; says why."""


def cache_directory() -> Path:
    """DVC's cache of the project in the current directory.

    Raises:
        SparsesweepError: this is no DVC project; with DVC's words.
    """
    try:
        with Repo() as repo:
            return Path(repo.cache.local_cache_dir)
    except DvcException as error:
        raise SparsesweepError(f"dvc failed: {' '.join(str(error).split())}") from None


class Files:
    """The files of a revision.

    revision: a commit; None: the workspace. cache: see cache_directory.
    """

    def __init__(self, revision: str | None, cache: Path) -> None:
        self.revision, self.cache = revision, cache

    def text(self, path: Path) -> str:
        """A file's text.

        Raises:
            Unreadable: it is neither here nor on a remote; says so.
        """
        cached = self._cached(path)
        try:
            content: str = self._dvc.read_text(path.as_posix(), encoding="utf8") if cached is None else cached.read_text(encoding="utf8")
        except (DvcException, DataIndexDirError, ValueError, *client_errors()) as error:
            reason = _reason(" ".join(str(error).split()))
            raise Unreadable(f"{path} is not there ({reason}); `make receive` brings it, or evaluating it again writes it") from None
        return content

    def json(self, path: Path) -> Any:
        """A file's JSON. Raises: Unreadable: see text; or it is none."""
        return _parsed(self.text(path), path)

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """The rows of JSON Lines. Raises: see json."""
        return [_parsed(line, path) for line in self.text(path).split("\n") if line]

    def digest(self, path: Path) -> str | None:
        """The MD5 by which DVC knows an output; None where the revision's lock names none."""
        return self._outputs.get(path)

    def has(self, path: Path) -> bool:
        """Whether the revision has a file."""
        if self.revision is None:
            return self._is_known_to_dvc(path)
        output = self._output(path)
        if output is None:
            return subprocess.run(["git", "cat-file", "-e", f"{self.revision}:{path.as_posix()}"], capture_output=True).returncode == 0
        members = self._members(output)
        return self._is_known_to_dvc(path) if members is None else path in members

    def _is_known_to_dvc(self, path: Path) -> bool:
        try:
            return bool(self._dvc.exists(path.as_posix()))
        except client_errors() + (DataIndexDirError,):  # the list of the directory's files is neither here nor on a remote
            return False

    @cached_property
    def _dvc(self) -> DVCFileSystem:
        """DVC's own view of the revision, made when it is needed."""
        return DVCFileSystem(rev=self.revision)

    @cached_property
    def _outputs(self) -> dict[Path, str]:
        """The outputs that the revision's lock names, with their hashes; none without a lock."""
        try:
            stages = {} if self.revision is None else read_lock(self.revision)
        except SparsesweepError:
            return {}
        return {Path(entry["path"]): entry["md5"] for stage in stages.values() for entry in stage.get("outs", [])}

    def _output(self, path: Path) -> Path | None:
        """The output that a path is, or lies in; None: the lock names none."""
        return next((output for output in (path, *path.parents) if output in self._outputs), None)

    def _members(self, output: Path) -> dict[Path, str] | None:
        """The files of an output with their hashes; None where the cache lacks the list of them."""
        digest = self._outputs[output]
        if not digest.endswith(DIRECTORY):
            return {output: digest}
        listed = object_of(self.cache, digest)
        if not listed.is_file():
            return None
        return {output / entry["relpath"]: entry["md5"] for entry in _parsed(listed.read_text(encoding="utf8"), listed)}

    def _cached(self, path: Path) -> Path | None:
        """Where a file lies in the cache; None if it is not there."""
        output = self._output(path)
        digest = None if output is None else (self._members(output) or {}).get(path)
        return None if digest is None or not (found := object_of(self.cache, digest)).is_file() else found


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients of remotes that are in use raise."""
    return (OSError, *(getattr(sys.modules[module], name) for module, name in CLIENT_ERRORS if module in sys.modules))


def _parsed(text: str, path: Path) -> Any:
    try:
        return parsed_json(text)
    except ValueError as error:
        raise Unreadable(f"{path}: not JSON ({error})") from None


def _reason(message: str) -> str:
    """Why DVC cannot read a file. It reads the configuration of the revision, and lays this clone's own over it."""
    if not message.startswith("config file error"):
        return message
    advice = "a remote was set after it ran: `dvc remote modify --local REMOTE url URL` repeats its url beside your own settings"
    return f"{message}; {advice}"
