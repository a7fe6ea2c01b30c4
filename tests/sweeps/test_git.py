"""What a sweep asks git."""

import subprocess

import pytest
import yaml

from benchmarks.unconfigured import ENVIRONMENT, IDENTITY, NO_CONFIGURATION
from stages.errors import SparsesweepError
from stages.experiments.command_output import output
from stages.sweeps import git


@pytest.fixture()
def repository(tmp_path, monkeypatch):
    """A repository with a bare one as origin, in the current directory."""
    for name, value in {**IDENTITY, **NO_CONFIGURATION}.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "clone"
    subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / "origin.git")], check=True)
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True)
    monkeypatch.chdir(root)
    (root / "conf").mkdir()
    (root / "conf/a.yaml").write_text("a: 1\n")
    output("git", "add", "-A")
    output("git", "commit", "-q", "-m", "First")
    output("git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    return root


def test_a_clean_clone_is_a_commit(repository):
    (repository / "elsewhere.txt").write_text("not needed")
    assert git.require_committed() == output("git", "rev-parse", "HEAD").strip()


def test_new_and_changed_files_are_named_and_ignored_ones_are_not(repository):
    (repository / "conf/a.yaml").write_text("a: 2\n")
    (repository / "conf/deep").mkdir()
    (repository / "conf/deep/new.yaml").write_text("")
    with pytest.raises(SparsesweepError, match=r"found conf/a.yaml, conf/deep/new.yaml \(new\), wanted them committed"):
        git.require_committed()


def test_files_of_which_git_does_not_know_are_refused_before_a_queue_and_changed_ones_are_not(repository):
    (repository / "conf/a.yaml").write_text("a: 2\n")
    (repository / "conf/staged.yaml").write_text("")
    output("git", "add", "conf/staged.yaml")
    git.main()
    (repository / "conf/new.yaml").write_text("")
    with pytest.raises(SystemExit, match="error: found conf/new.yaml, wanted git to know them: a queued run is without them; `git add`"):
        git.main()


def test_a_commit_that_others_cannot_clone_is_refused(repository):
    commit = git.require_committed()
    with pytest.raises(SparsesweepError, match=f"found commit {commit[:12]} on no branch of origin, .*`git push origin`"):
        git.require_at("origin", commit)
    output("git", "push", "-q", "origin", "main")
    git.require_at("origin", commit)
    with pytest.raises(SparsesweepError, match="found no git remote 'team', wanted one from which other machines clone"):
        git.require_at("team", commit)


def test_experiments_are_fetched_by_name(repository):
    output("git", "push", "-q", "origin", "main")
    for name in ("ours", "theirs"):
        output("git", "push", "-q", "origin", f"HEAD:refs/exps/ab/{'c' * 38}/{name}")
    git.fetch_experiments("origin", ["ours", "absent"])
    assert output("git", "for-each-ref", "--format=%(refname)", "refs/exps").split() == [f"refs/exps/ab/{'c' * 38}/ours"]


def test_an_error_has_gits_words(repository):
    with pytest.raises(SparsesweepError, match="git show absent failed: fatal: .*absent"):
        output("git", "show", "absent")


def test_an_experiment_of_the_same_name_that_is_here_stays(repository):
    path = f"refs/exps/ab/{'c' * 38}/ours"
    output("git", "push", "-q", "origin", "main", f"HEAD:{path}")
    output("git", "commit", "-q", "--allow-empty", "-m", "Mine")
    output("git", "update-ref", path, "HEAD")
    git.fetch_experiments("origin", ["ours"])
    assert output("git", "rev-parse", path) == output("git", "rev-parse", "HEAD")


def test_points_of_a_revision_are_composed_from_its_files(repository):
    commit = output("git", "rev-parse", "HEAD").strip()
    git.require_composed_from(commit)
    (repository / "conf/a.yaml").write_text("a: 2\n")
    (repository / "conf/new.yaml").write_text("")
    with pytest.raises(SparsesweepError, match=f"--revision: found conf/a.yaml, conf/new.yaml changed, wanted them as in {commit[:12]}"):
        git.require_composed_from(commit)


def test_hashes_of_code_are_those_by_which_dvc_knows_it(repository):
    (repository / "stages/inner").mkdir(parents=True)
    for name, text in (("stages/a.py", "a = 1\n"), ("stages/inner/b.py", "b = 2\n"), ("stages/inner/ignored.py", "")):
        (repository / name).write_text(text)
    (repository / ".dvcignore").write_text("ignored.py\n")
    stage = {"cmd": "true", "deps": ["stages/a.py", "stages/inner"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"s": stage}}))
    subprocess.run(["dvc", "init", "-q"], env=ENVIRONMENT, check=True)
    output("git", "add", "-A")
    output("git", "commit", "-q", "-m", "Code")
    (repository / "linked").mkdir()
    (repository / "linked/to").symlink_to("../stages/a.py")
    output("git", "add", "-A")
    output("git", "commit", "-q", "-m", "A link")
    subprocess.run(["dvc", "repro", "-q"], env=ENVIRONMENT, check=True)
    locked = {entry["path"]: entry["md5"] for entry in yaml.safe_load((repository / "dvc.lock").read_text())["stages"]["s"]["deps"]}
    assert git.md5s("HEAD", (*locked, "absent", "linked")) == locked
