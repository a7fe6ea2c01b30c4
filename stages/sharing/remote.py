"""The remotes of a project: git's, to which experiments go, and DVC's, to which their files go; and what is wrong with them."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import map_scm_exception

from stages.errors import SharingError
from stages.experiments.files import client_errors

ORIGIN = "origin"  # the git remote, unless exp.git_remote of DVC's configuration names another
DIRECTORIES = ("local", "ssh")  # protocols of remotes that are directories
SECRETS = {
    "access_key_id", "secret_access_key", "session_token", "password", "passphrase", "token", "custom_auth_header", "connection_string",
    "sas_token", "account_key", "client_secret", "oss_key_id", "oss_key_secret", "gdrive_client_secret",
    "sse_customer_key",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Remotes:
    """Where a project shares.

    git: name of the git remote. dvc: name of the DVC remote; None: several clones share one cache directory, and nothing else.
    """

    git: str
    dvc: str | None

    def __str__(self) -> str:
        return f"{self.git} and the shared cache" if self.dvc is None else f"{self.git} and the remote {self.dvc}"


@contextmanager
def project() -> Iterator[Repo]:
    """The DVC project of the current directory; errors of DVC, git and the clients of remotes become ours, with their words.

    Raises:
        SharingError: this is no DVC project, or DVC, git or a remote fails.
    """
    try:
        with map_scm_exception(), Repo() as repo:
            yield repo
    except DvcException as error:
        causes = [error, *_causes(error)]
        raise SharingError(": ".join(dict.fromkeys(" ".join(str(cause).split()) for cause in causes))) from error
    except client_errors() as error:
        raise SharingError(f"the remote does not answer, or refuses: {' '.join(str(error).split()) or type(error).__name__}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


def checked(repo: Repo, *, writable: bool) -> Remotes:
    """The remotes of a project, after a check that they can be shared by.

    Args:
        writable: also write a small file to the DVC remote, and remove it.

    Raises:
        SharingError: no DVC remote and no shared cache is set; the remote is not there or does not verify what is read; or a secret is in
            the configuration that git shares. Says how it is set.
        DvcException, OSError: the remote refuses.
    """
    _require_no_secrets(repo.config.read("repo"))
    git_remote: str = repo.config["exp"].get("git_remote", ORIGIN)
    name: str | None = repo.config["core"].get("remote")
    if name is None:
        if not repo.config["cache"].get("dir"):
            raise SharingError(
                "found no DVC remote, wanted one that the team shares: `dvc remote add -d shared PATH_OR_URL`, "
                "`dvc remote modify shared verify true`, and commit .dvc/config"
            )
        return Remotes(git=git_remote, dvc=None)
    if name not in repo.config["remote"]:
        known = ", ".join(repo.config["remote"]) or "(none)"
        raise SharingError(f"core.remote: found {name}, wanted one of the remotes that are set: {known}; `dvc remote default` chooses one")
    if not repo.config["remote"][name].get("verify"):
        advice = f"`dvc remote modify {name} verify true` sets it"
        raise SharingError(f"remote {name}: found no verify, wanted true, without which a damaged file is taken as it is: {advice}")
    _require_storage(repo, name, writable=writable)
    return Remotes(git=git_remote, dvc=name)


def _require_storage(repo: Repo, name: str, *, writable: bool) -> None:
    remote = repo.cloud.get_remote(name)
    location = remote.fs.unstrip_protocol(remote.path)
    if remote.fs.protocol in DIRECTORIES and not remote.fs.exists(remote.path):
        advice = "is its disk mounted? DVC would make a new one; for a first use make it by mkdir"
        raise SharingError(f"remote {name}: found no directory {location}, wanted one that is there: {advice}")
    if writable:
        probe = remote.fs.join(remote.path, f".writable-{uuid.uuid4().hex}")
        try:
            remote.fs.pipe_file(probe, b"")
            remote.fs.rm_file(probe)
        except client_errors() as error:
            raise SharingError(f"remote {name}: found that {location} cannot be written, wanted to share there ({error})") from error


def _require_no_secrets(shared: dict[str, Any]) -> None:
    """Refuse secrets in .dvc/config, which git shares; their values are not printed."""
    for name, settings in shared.get("remote", {}).items():
        found = sorted(SECRETS & set(settings)) + ["a password in its url"] * bool(urlsplit(str(settings.get("url"))).password)
        if found:
            advice = f"`dvc remote modify --local {name} ...` writes it to .dvc/config.local, which git ignores"
            raise SharingError(f"remote {name}: found {', '.join(found)} in .dvc/config, which git shares, wanted it elsewhere: {advice}")
