"""What is wrong with a remote is said before anything is sent."""

import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from stages.errors import SharingError
from stages.sharing.remote import Remotes, checked, project
from tests.project import ENVIRONMENT


@pytest.fixture()
def configured(tmp_path, monkeypatch):
    """An empty DVC project in the current directory; writes its .dvc/config and config.local, and checks its remotes."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    subprocess.run(["dvc", "init", "-q"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    monkeypatch.chdir(tmp_path)

    def go(shared: str, local: str = "", *, writable: bool = True) -> Remotes:
        Path(".dvc/config").write_text(shared)
        Path(".dvc/config.local").write_text(local)
        with project() as repo:
            return checked(repo, writable=writable)

    return go


def remote(url: object, *lines: str, name: str = "shared") -> str:
    return "\n".join([f"[core]\nremote = {name}", f"['remote \"{name}\"']", f"url = {url}", *lines, ""])


def test_a_directory_that_verifies_is_shared_by(configured, tmp_path):
    (tmp_path / "store").mkdir()
    found = configured(remote(tmp_path / "store", "verify = true") + "[exp]\ngit_remote = upstream\n")
    assert found == Remotes(git="upstream", dvc="shared")
    assert str(found) == "upstream and the remote shared"
    assert list((tmp_path / "store").iterdir()) == []  # nothing is left of the check


def test_without_a_remote_its_command_is_said(configured):
    with pytest.raises(SharingError, match=r"^found no DVC remote, wanted one .*`dvc remote add -d shared PATH_OR_URL`"):
        configured("")


def test_a_default_that_is_no_remote_is_named(configured, tmp_path):
    with pytest.raises(
        SharingError, match="core.remote: found shraed, wanted one of the remotes that are set: shared; `dvc remote default`"
    ):
        configured(remote(tmp_path, "verify = true").replace("remote = shared", "remote = shraed"))


def test_clones_with_one_cache_need_no_remote(configured, tmp_path):
    assert configured("", f"[cache]\ndir = {tmp_path / 'cache'}\n") == Remotes(git="origin", dvc=None)


@pytest.mark.parametrize("line", ["", "verify = false"])
def test_a_remote_that_does_not_verify_is_refused(configured, tmp_path, line):
    with pytest.raises(SharingError, match="remote shared: found no verify, wanted true.*`dvc remote modify shared verify true`"):
        configured(remote(tmp_path, line))


def test_a_directory_that_is_not_there_is_not_made(configured, tmp_path):
    with pytest.raises(SharingError, match="remote shared: found no directory .*/unmounted, wanted one that is there: is its disk mounted"):
        configured(remote(tmp_path / "unmounted", "verify = true"), writable=False)
    assert not (tmp_path / "unmounted").exists()


def test_a_remote_that_cannot_be_written_is_refused_only_for_sharing(configured, tmp_path, monkeypatch):
    def refuse(self, path, value):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dvc_objects.fs.base.FileSystem.pipe_file", refuse)
    settings = remote(tmp_path, "verify = true")
    assert configured(settings, writable=False).dvc == "shared"
    with pytest.raises(SharingError, match=r"remote shared: found that .* cannot be written, wanted to share there \(.*Permission denied"):
        configured(settings)


@pytest.mark.parametrize(
    ("url", "line", "named"),
    [
        ("s3://bucket/store", "secret_access_key = hidden", "secret_access_key"),
        ("ssh://host/store", "password = hidden", "password"),
        ("ssh://user:hidden@host/store", "", "a password in its url"),
    ],
)
def test_a_secret_in_the_configuration_that_git_shares_is_refused_and_not_printed(configured, url, line, named):
    with pytest.raises(SharingError, match=f"remote shared: found {named} in .dvc/config, which git shares.*--local shared") as refused:
        configured(remote(url, "verify = true", line))
    assert "hidden" not in str(refused.value)


def test_elsewhere_than_in_a_project_there_is_nothing_to_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SharingError, match="not inside of a DVC repository"), project():
        pass


def test_an_error_of_a_client_is_ours(configured):
    configured("", "[cache]\ndir = elsewhere\n")
    with pytest.raises(SharingError, match="the remote does not answer, or refuses: no route"), project() as repo:
        assert isinstance(repo, Repo)
        raise OSError("no route")
