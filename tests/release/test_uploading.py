"""A release goes to a hub on loopback by the real client, and comes back by it."""

import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import upload
from stages.config.compose import composed
from stages.errors import ConfigError, ReleaseError
from stages.files import CREATED_REPOSITORIES, SUMS, UPLOAD, read_json, sha256
from stages.release.packing import write_sums
from stages.release.section import Hub
from stages.release.uploading import WAIT
from stages.schema import check
from tests.conftest import HUB
from tests.hub_uploads import PART, Uploads

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>'")  # of the client's own call of httpx2
REPO = "org/small-sparse50"
TOKEN = "hf_OnlyInTheEnvironment"


def hub(**changes: object) -> Hub:
    return Hub(**{"repo": REPO, "private": True, "existing": False, "dry_run": False, **changes})


@pytest.fixture(scope="module")
def released(source, tmp_path_factory) -> Path:
    """A directory as publish leaves it."""
    release = tmp_path_factory.mktemp("publish") / "release"
    shutil.copytree(source, release)
    (release / "README.md").write_text("---\nlicense: mit\n---\n# small\n")
    (release / "sub").mkdir()
    (release / "sub/NOTICE.md").write_text("a notice\n")
    write_sums(release)
    return release


@pytest.fixture()
def project(released, tmp_path, monkeypatch) -> Path:
    """A project with a release, a hub without repositories, and a token that may write."""
    HUB.repositories.clear()
    HUB.uploads = Uploads(HUB.repositories, HUB.uploads.made, token=TOKEN)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released, tmp_path / "release")
    yield tmp_path
    HUB.repositories.clear()


def run(**changes: object) -> dict:
    section = hub(**changes)
    check(section, "publish.hub")
    upload.main.function(publish_hub=section)
    return read_json(UPLOAD)


def shards(directory: Path) -> list[str]:
    return sorted(sha256(path) for path in directory.glob("*.safetensors"))


# What goes there is what comes back.


def test_a_release_comes_back_byte_for_byte_and_loads_in_stock_transformers(project, tmp_path):
    sent = run()
    there = HUB.repositories[REPO]
    assert (there.private, sent["commit"], sent["repo"]) == (True, there.commit, REPO)
    assert sent["sha256sums"] == sha256(project / "release" / SUMS)
    assert len(HUB.uploads.parents) == 1  # one commit has all of it
    back = Path(snapshot_download(REPO, revision=sent["commit"], local_dir=tmp_path / "back", token=TOKEN))
    names = {path.relative_to(project / "release") for path in (project / "release").rglob("*") if path.is_file()}
    assert sent["files"] == len(names)
    for name in names:
        assert (back / name).read_bytes() == (project / "release" / name).read_bytes(), name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    ours = AutoModelForCausalLM.from_pretrained(project / "release")
    tokens = tokenizer("river stone", return_tensors="pt").input_ids
    assert torch.equal(model(tokens).logits, ours(tokens).logits)


def test_large_files_are_sent_in_parts_or_whole(project):
    sizes = {path.stat().st_size > PART for path in (project / "release").glob("*.safetensors")}
    assert sizes == {True, False}
    run()
    assert sorted(one for one in HUB.uploads.received if not one.startswith("repository")) == shards(project / "release")


def test_without_a_repository_nothing_is_asked(project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree("release")
    assert run(repo=None)["commit"] is None
    assert HUB.uploads.received == []


def test_a_dry_run_names_every_file_and_sends_nothing(project, monkeypatch, caplog):
    monkeypatch.delenv("HF_TOKEN")
    with caplog.at_level(logging.INFO):
        assert run(dry_run=True)["commit"] is None
    size = sum(path.stat().st_size for path in (project / "release").rglob("*") if path.is_file())
    assert f"dry run, nothing was sent: {len(list((project / 'release').iterdir()))} files, {size / 1e6:.1f} MB" in caplog.text
    assert f"would go to {HUB.endpoint}/{REPO}, private" in caplog.text
    for path in (project / "release").glob("*"):
        assert path.is_dir() or f"{path.name}: {path.stat().st_size} bytes" in caplog.text
    assert HUB.repositories == {}


def test_another_release_takes_the_place_of_all_files_of_the_one_before(project):
    run()
    (project / "release/sub/NOTICE.md").unlink()
    (project / "release/config.json").write_text(json.dumps(read_json(project / "release/config.json") | {"more": 1}))
    (project / "release" / SUMS).unlink()
    write_sums(project / "release")
    stored = list(HUB.uploads.received)
    run()
    there = HUB.repositories[REPO].files
    here = {path.relative_to(project / "release").as_posix() for path in (project / "release").rglob("*") if path.is_file()}
    assert set(there) == here | {".gitattributes"}
    assert json.loads(there["config.json"])["more"] == 1
    assert HUB.uploads.received == stored  # no weights were sent again
    assert len(HUB.uploads.parents) == 2


def test_the_same_release_again_is_the_same_commit(project):
    assert run()["commit"] == run()["commit"]
    assert len(HUB.uploads.parents) == 1


# What fails leaves the repository as it was.


def test_a_run_that_was_cut_goes_on_with_the_files_that_are_not_there(project):
    HUB.uploads.cut_after = 1
    HUB.uploads.go_on.set()
    with pytest.raises(ReleaseError, match=r"Error while uploading '.*safetensors' to the Hub.*what is stored is not sent again") as error:
        run()
    assert "signature" not in str(error.value)
    assert set(HUB.repositories[REPO].files) == {".gitattributes"}
    stored = set(HUB.uploads.stored)
    assert 1 <= len(stored) < len(shards(project / "release"))
    HUB.uploads.cut_after, HUB.uploads.received = None, []
    run()
    assert sorted(HUB.uploads.received) == sorted(set(shards(project / "release")) - stored)
    assert len(HUB.uploads.parents) == 1


def test_a_run_that_was_killed_goes_on_likewise_in_the_repository_that_it_made(project):
    (project / "params.yaml").write_text(OmegaConf.to_yaml(composed(f"publish.hub.repo={REPO}")))
    HUB.uploads.cut_after = 1
    process = subprocess.Popen([sys.executable, "-m", "stages.upload"], cwd=project)
    assert HUB.uploads.is_cut.wait(60)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    HUB.uploads.go_on.set()
    assert set(HUB.repositories[REPO].files) == {".gitattributes"}
    assert not (project / UPLOAD).exists()
    stored = set(HUB.uploads.stored)
    assert 1 <= len(stored) < len(shards(project / "release"))
    HUB.uploads.cut_after, HUB.uploads.received = None, []
    run()
    assert sorted(HUB.uploads.received) == sorted(set(shards(project / "release")) - stored)
    assert len(HUB.uploads.parents) == 1


def test_a_rejected_token_is_said_and_is_not_printed(project, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_Expired")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ReleaseError, match="refused by 401.*did not take the token of HF_TOKEN") as error,
    ):
        run()
    assert "hf_Expired" not in caplog.text + str(error.value)
    assert HUB.repositories == {}
    assert read_json(CREATED_REPOSITORIES) == {}  # nor is it taken for its own later


def test_without_a_token_it_is_refused_even_if_a_login_left_one(project, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(TOKEN)
    with pytest.raises(ReleaseError, match=f"HF_TOKEN: not in the environment, wanted a token that may write to {REPO}"):
        run()


def test_a_used_up_quota_is_said(project):
    HUB.uploads.quota = 1000
    with pytest.raises(ReleaseError, match="refused by 403.*storage limit reached.*may not write there, or the storage .* is used up"):
        run()
    assert set(HUB.repositories[REPO].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("asks", "seconds"),
    [
        ({"Retry-After": "1"}, 2),
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 56),
        ({"ratelimit": '"api";r=0;t=55', "Retry-After": "1"}, 56),
        ({"ratelimit": '"api";r=3;t=55', "Retry-After": "1"}, 2),
    ],
)
def test_the_hub_is_waited_for_as_long_as_it_asks_and_a_second_more(project, monkeypatch, asks, seconds):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    of_repository = [f"/api/models/{REPO}/preupload/main", f"/{REPO}.git/info/lfs/objects/batch", f"/api/models/{REPO}/commit/main"]
    HUB.uploads.asks = asks
    HUB.uploads.busy = Counter([f"/api/models/{REPO}", "/api/repos/create", *of_repository])
    run()
    assert waited == [seconds] * 5
    assert len(HUB.uploads.parents) == 1


def test_a_busy_hub_that_names_no_time_is_asked_again(project, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    HUB.uploads.asks, HUB.uploads.busy = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, Counter([f"/api/models/{REPO}/commit/main"])
    run()
    assert waited == [WAIT]


def test_a_hub_that_is_busy_once_the_commit_is_made_is_waited_for(project):
    HUB.uploads.busy = Counter([f"/api/models/{REPO}/revision/"])
    assert run()["commit"] == HUB.repositories[REPO].commit
    assert HUB.uploads.busy[f"/api/models/{REPO}/revision/"] == 0


def test_a_commit_whose_files_could_not_be_compared_is_said_to_be_made(project):
    HUB.uploads.busy = Counter({f"/api/models/{REPO}/revision/": 100})
    with pytest.raises(ReleaseError, match="the commit [0-9a-f]{40} is made, and its files could not be compared: the hub refused by 429"):
        run()
    assert len(HUB.uploads.parents) == 1
    HUB.uploads.busy.clear()
    assert run()["commit"] == HUB.repositories[REPO].commit
    assert len(HUB.uploads.parents) == 1


def test_a_hub_that_stays_busy_is_given_up(project):
    HUB.uploads.busy = Counter({f"/api/models/{REPO}/commit/main": 100})
    with pytest.raises(ReleaseError, match="refused by 429.*too many requests; run again later"):
        run()


def test_a_repository_of_others_is_refused_unless_told(project, hub_repository):
    hub_repository(REPO, {"old.bin": b"old"}, private=True)
    with pytest.raises(ReleaseError, match="found a repository that was not created from here.*publish.hub.existing=true"):
        run()
    assert set(HUB.repositories[REPO].files) == {"old.bin"}
    run(existing=True)
    assert "old.bin" not in HUB.repositories[REPO].files


def test_a_repository_that_another_made_after_the_hub_did_not_answer_is_not_overwritten(project, hub_repository, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch, pytest.raises(ReleaseError, match="the hub does not answer"):
        patch.setattr("huggingface_hub.HfApi.create_repo", lost)
        run()
    hub_repository(REPO, {"theirs.bin": b"theirs"}, private=True)
    with pytest.raises(ReleaseError, match="found a repository that was not created from here"):
        run()
    assert set(HUB.repositories[REPO].files) == {"theirs.bin"}
    hub_repository(REPO, {".gitattributes": b""}, private=True)  # it had arrived all the same
    run()
    assert set(read_json(CREATED_REPOSITORIES).values()) == {True}


def test_a_release_that_has_another_name_is_sent_with_a_warning(project, caplog):
    (project / "release/params.yaml").write_text("publish:\n  name: null\n")
    (project / "release" / SUMS).unlink()
    write_sums(project / "release")
    run()
    assert f"not {REPO}; publish with publish.name={REPO} to have it in them" in caplog.text


def test_what_is_to_be_private_does_not_go_to_a_public_repository(project, hub_repository):
    hub_repository(REPO, {}, private=False)
    with pytest.raises(ReleaseError, match="found a public repository, wanted a private one, as publish.hub.private says"):
        run(existing=True)


def test_a_commit_of_others_meanwhile_is_not_overwritten(project, monkeypatch):
    batch = HUB.uploads._batch

    def interfered(request, name, said):
        HUB.repositories[name].commit = "f" * 40
        return batch(request, name, said)

    monkeypatch.setattr(HUB.uploads, "_batch", interfered)
    with pytest.raises(ReleaseError, match="refused by 412.*the repository changed meanwhile; run again"):
        run()
    assert set(HUB.repositories[REPO].files) == {".gitattributes"}


def test_other_bytes_on_the_hub_are_noticed(project):
    store = HUB.uploads.stored
    run()
    first = next(iter(store))
    name = next(name for name, content in HUB.repositories[REPO].files.items() if hashlib.sha256(content).hexdigest() == first)
    (project / "release/README.md").write_text("---\nlicense: mit\n---\n# another\n")
    (project / "release" / SUMS).unlink()
    write_sums(project / "release")
    HUB.repositories[REPO].wrong_hashes = True
    with pytest.raises(ReleaseError, match=rf"found other bytes of .*{name.split('-')[0]}.* than were sent"):
        run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda release: (release / SUMS).unlink(), "SHA256SUMS: not found, wanted a release"),
        (lambda release: (release / "more.txt").write_text("x"), "release: found more.txt in the directory or in SHA256SUMS alone"),
        (lambda release: (release / "config.json").write_text("{}"), "release/config.json: found SHA-256 [0-9a-f]{64}, wanted"),
    ],
)
def test_a_release_that_is_not_whole_is_not_sent(project, change, message):
    change(project / "release")
    with pytest.raises(ReleaseError, match=message):
        run()
    assert HUB.repositories == {}


@pytest.mark.parametrize("repo", ["small", "a/b/c", "org/../x", "org/x y", ""])
def test_a_name_that_is_no_repository_is_refused(repo):
    with pytest.raises(ConfigError, match="publish.hub.repo: found .*, wanted null or ORG/NAME"):
        check(hub(repo=repo), "publish.hub")


def test_the_token_is_in_no_file_and_in_no_line_of_the_log(project, caplog):
    with caplog.at_level(logging.DEBUG):
        run()
    written = [path for path in project.rglob("*") if path.is_file()]
    assert {UPLOAD.name, CREATED_REPOSITORIES.name} <= {path.name for path in written}
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in caplog.text
