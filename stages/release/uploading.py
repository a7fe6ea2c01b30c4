"""Send a release to a model hub: all of it in one commit, or none of it.

Large files are stored by their SHA-256 first, where nobody sees them, then one commit names all files of the release and removes all
others. What is stored already is not sent again, so a run that was cut goes on where it was. The commit names the one before it: if the
repository changed meanwhile, the hub refuses.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx2  # the transport of huggingface_hub, whose errors it lets through
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils.sha import git_hash

from stages.errors import ReleaseError
from stages.files import CREATED_REPOSITORIES, SUMS, is_inner_path, read_json, sha256, write_json
from stages.release.section import Hub
from stages.release.sent import Sent, visibility

log = logging.getLogger(__name__)

TOKEN = "HF_TOKEN"
PARAMS = "params.yaml"
OF_THE_HUB = ".gitattributes"  # which it makes itself: how it stores what kind of file
TRIES, WAIT = 6, 5.0  # of a request that is refused by 429; seconds before the next where the hub names none
ADVICE = {
    401: f"it did not take the token of {TOKEN}",
    403: f"the token of {TOKEN} may not write there, or the storage that the hub grants is used up",
    409: "a repository of this name is there already, which the token may not read",
    412: "the repository changed meanwhile; run again",
    413: "a file is larger than the hub takes",
    429: "too many requests; run again later, what is stored is not sent again",
}

Result = TypeVar("Result")


def send(release: Path, hub: Hub) -> Sent:
    """Make the repository if it is not there, and its newest commit the release.

    Raises:
        ReleaseError: the release is not whole; there is no token; the repository is another's, or is seen by others than asked for; the
            hub refuses or does not answer. Its files are then as they were.
    """
    constants.HF_HUB_DISABLE_XET = True  # read at each upload: what is sent goes by LFS, file by file
    files = released_files(release)
    if PARAMS in files and (named := yaml.safe_load(files[PARAMS].read_text(encoding="utf8")).get("publish", {}).get("name")) != hub.repo:
        otherwise = f"publish with publish.name={hub.repo} to have it in them"
        log.warning("the commands on the release's card have its name, %s, not %s; %s", named or "one that is made up", hub.repo, otherwise)
    api = HfApi(token=_token(hub))
    commit = None
    if hub.dry_run:
        for name, path in files.items():
            log.info("%s: %d bytes", name, path.stat().st_size)
    else:
        commit = _send(api, hub, files)
    return Sent(
        repo=hub.repo,
        commit=commit,
        url=f"{api.endpoint}/{hub.repo}",
        private=hub.private,
        files=len(files),
        size=sum(path.stat().st_size for path in files.values()),
        sha256sums=sha256(release / SUMS),
    )


def released_files(release: Path) -> dict[str, Path]:
    """Every file of a release, by its name, after a check that they are those of its SHA256SUMS.

    Raises:
        ReleaseError: a file is missing, is not listed, or differs; names it.
    """
    sums = release / SUMS
    if not sums.is_file():
        raise ReleaseError(f"{sums}: not found, wanted a release; run the publish stage")
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in sums.read_text(encoding="utf8").splitlines())}
    there = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    if others := sorted(there ^ {*wanted, SUMS}):
        raise ReleaseError(f"{release}: found {', '.join(others[:3])} in the directory or in {SUMS} alone; run the publish stage again")
    for name, digest in wanted.items():
        if not is_inner_path(name) or (actual := sha256(release / name)) != digest:
            raise ReleaseError(f"{release / name}: found SHA-256 {actual}, wanted {digest}; run the publish stage again")
    return {name: release / name for name in sorted(there)}


def _token(hub: Hub) -> str:
    """Of the environment alone: one that a login left on this machine is not taken."""
    token = os.environ.get(TOKEN, "")
    if not token and not hub.dry_run:
        raise ReleaseError(f"{TOKEN}: not in the environment, wanted a token that may write to {hub.repo}")
    return token


def _send(api: HfApi, hub: Hub, files: dict[str, Path]) -> str:
    """Returns the commit. Raises: see send."""
    repo = str(hub.repo)
    try:
        before = _opened(api, hub)
        old = [sibling.rfilename for sibling in before.siblings or []]
        gone = [CommitOperationDelete(name, is_folder=False) for name in old if name not in files and name != OF_THE_HUB]
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        commit = _patiently(
            lambda: api.create_commit(repo, [*gone, *added], commit_message="The release", parent_commit=before.sha, revision="main")
        ).oid
        _require_there(api, repo, commit, files)
    except HfHubHTTPError as error:
        raise ReleaseError(f"{repo}: {_answer(error)}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise ReleaseError(f"{repo}: the hub does not answer ({_public(error)}); run again, what is stored is not sent again") from None
    except (RuntimeError, ValueError, LookupError, TypeError) as error:  # of a file that did not arrive; of an answer of another form
        cause = error.__cause__
        reason = _answer(cause) if isinstance(cause, HfHubHTTPError) else _public(cause or error)
        raise ReleaseError(f"{repo}: {_public(error)} {reason}; run again, what is stored is not sent again") from None
    return str(commit)


def _opened(api: HfApi, hub: Hub) -> Any:
    """The newest commit and the files of the repository, which is created if it is not there."""
    repo, url = str(hub.repo), f"{api.endpoint}/{hub.repo}"
    try:
        info = _patiently(lambda: api.model_info(repo))
    except RepositoryNotFoundError:
        return _created(api, hub, url)
    created = _noted().get(url)
    if created is None and not hub.existing or created is False and _has_files(info) and not hub.existing:
        advice = "publish.hub.existing=true replaces all its files by the release"
        raise ReleaseError(f"{repo}: found a repository that was not created from here, wanted none; {advice}")
    if created is False:  # it was asked for, and the answer was lost
        _note({**_noted(), url: True})
    if info.private != hub.private:
        found, wanted = visibility(private=bool(info.private)), visibility(private=hub.private)
        raise ReleaseError(f"{repo}: found a {found} repository, wanted a {wanted} one, as publish.hub.private says; change either")
    return info


def _created(api: HfApi, hub: Hub, url: str) -> Any:
    """A new repository. That it is asked for is noted before it is there, so that a run that is cut goes on."""
    before = _noted()
    _note({**before, url: False})
    try:
        _patiently(lambda: api.create_repo(str(hub.repo), private=hub.private))
    except HfHubHTTPError:
        _note(before)
        raise
    _note({**before, url: True})
    log.info("created %s, %s", url, visibility(private=hub.private))
    return _patiently(lambda: api.model_info(str(hub.repo)))


def _noted() -> dict[str, bool]:
    """The repositories that were asked for from here, and whether the hub said that they were made."""
    noted = read_json(CREATED_REPOSITORIES) if CREATED_REPOSITORIES.is_file() else {}
    return noted if isinstance(noted, dict) else dict.fromkeys(noted, True)  # of earlier versions a list


def _note(repositories: dict[str, bool]) -> None:
    CREATED_REPOSITORIES.parent.mkdir(parents=True, exist_ok=True)
    write_json(CREATED_REPOSITORIES, repositories)


def _has_files(info: Any) -> bool:
    return any(sibling.rfilename != OF_THE_HUB for sibling in info.siblings or [])


def _patiently(request: Callable[[], Result]) -> Result:
    """Repeat a request that the hub refuses by 429, after the seconds that it names. The client itself does so for other requests."""
    for _ in range(TRIES - 1):
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code != 429:
                raise
            seconds = _seconds(error.response.headers)
            log.warning("the hub is busy; next try after %.0f s", seconds)
            time.sleep(seconds)
    return request()


def _seconds(headers: Mapping[str, str]) -> float:
    """How long the headers of a 429 ask to wait: `ratelimit`, as the hub sends it, or `Retry-After`; a second more, as in the client."""
    limit, named = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    return int(named) + 1.0 if named.isdecimal() else WAIT


def _require_there(api: HfApi, repo: str, commit: str, files: dict[str, Path]) -> None:
    """Compare what the hub says of the commit's files with those here."""
    try:
        info = _patiently(lambda: api.model_info(repo, revision=commit, files_metadata=True))
    except HfHubHTTPError as error:
        raise ReleaseError(f"{repo}: the commit {commit} is made, and its files could not be compared: {_answer(error)}") from None
    there = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings or [] if one.rfilename != OF_THE_HUB}
    stored = {one.rfilename for one in info.siblings or [] if one.lfs}
    here = {name: sha256(path) if name in stored else git_hash(path.read_bytes()) for name, path in files.items()}
    if different := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise ReleaseError(f"{repo} at {commit}: found other bytes of {', '.join(different[:3])} than were sent; run again")


def _answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    return f"the hub refused by {status}{said}: {ADVICE.get(status, 'run again, what is stored is not sent again')}"


def _public(error: BaseException) -> str:
    """The words of an error without the queries of its URLs, which sign an upload."""
    return re.sub(r"\?[^\s'\"]+", "", " ".join(str(error).split()))
