"""What a worker does on a machine, beside running DVC."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stages.sweeps import worker
from stages.sweeps.worker import Task
from tests.project import ENVIRONMENT


@pytest.fixture()
def task(tmp_path) -> Task:
    return Task(
        name="point",
        overrides=("a=1",),
        target="evaluate_sparse",
        origin=str(tmp_path / "absent"),
        revision="a" * 40,
        directory=str(tmp_path / "work"),
        cache=str(tmp_path / "cache"),
        share=False,
        threads=3,
        cards=None,
    )


def test_commands_have_the_threads_and_cards_of_the_task(task, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    environment = worker._environment(task)
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("3", "7")
    assert environment["PATH"].startswith(str(worker.Path(sys.executable).parent))
    assert worker._environment(replace(task, cards=""))["CUDA_VISIBLE_DEVICES"] == ""


def test_a_command_that_fails_is_the_outcome_with_its_words_and_its_log(task, tmp_path):
    outcome = worker.run(task)
    log = tmp_path / "work/point.log"
    assert outcome.error.startswith("git clone -q exited with 128: fatal: repository")
    assert outcome.error.endswith(f"its log: {log}")
    assert log.read_text().startswith("$ git clone")


def test_credentials_in_the_address_of_the_origin_are_in_no_log(task, tmp_path):
    worker.run(replace(task, origin="https://me:hf_Secret@127.0.0.1:9/project.git"))
    log = (tmp_path / "work/point.log").read_text()
    assert "https://127.0.0.1:9/project.git" in log
    assert "hf_Secret" not in log


def test_a_clone_that_an_earlier_run_left_hands_over_to_the_origin_of_this_one(task, tmp_path):
    first, second, clone = (tmp_path / name for name in ("first", "second", "clone"))
    for origin in (first, second):
        (origin / ".dvc").mkdir(parents=True)
        (origin / ".dvc/config").write_text("")
        git(origin, "init", "-q", "-b", "main")
        git(origin, "add", "-A")
        git(origin, "commit", "-q", "-m", origin.name)
    git(tmp_path, "clone", "-q", str(first), str(clone))
    head = git(second, "rev-parse", "HEAD")
    with (tmp_path / "log").open("w") as log:
        asked = replace(task, origin=str(second), revision=head)
        worker._prepare(asked, worker._Shell(clone, log, worker._environment(asked)))
    assert git(clone, "rev-parse", "HEAD") == head
    git(second, "checkout", "-q", "--detach")
    git(second, "commit", "-q", "--allow-empty", "-m", "On no branch, as in a worktree")
    detached = git(second, "rev-parse", "HEAD")
    git(second, "checkout", "-q", "main")
    with (tmp_path / "log").open("w") as log:
        asked = replace(task, origin=str(second), revision=detached)
        worker._prepare(asked, worker._Shell(clone, log, worker._environment(asked)))
    assert git(clone, "rev-parse", "HEAD") == detached


def git(root: Path, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@localhost")
    return subprocess.run(["git", *author, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_files_are_sent_before_the_experiment_is_named(task):
    said = []

    reference = f"refs/exps/aa/{'a' * 38}/point"
    worker._hand_over(replace(task, share=True), lambda *command: said.append(command))
    assert said == [
        ("git", "checkout", "-q", "--force", "--detach", f"refs/exps/aa/{'a' * 38}/point"),
        ("dvc", "push", "--run-cache"),
        ("git", "push", "-q", "--force", "origin", f"{reference}:{reference}"),
    ]


@pytest.mark.parametrize("meanwhile", ["nothing", "another", "gone"])
def test_what_another_gave_a_teams_origin_meanwhile_stays_and_what_was_there_before_is_replaced(task, tmp_path, meanwhile):
    def git(*command: str, where: Path) -> str:
        return subprocess.run(["git", *command], cwd=where, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout.strip()

    origin, clone = tmp_path / "origin.git", tmp_path / "point"
    git("init", "-q", "--bare", str(origin), where=tmp_path)
    git("init", "-q", str(clone), where=tmp_path)
    git("remote", "add", "origin", str(origin), where=clone)
    commits = []
    for number in range(3):
        git("commit", "-q", "--allow-empty", "-m", str(number), where=clone)
        commits.append(git("rev-parse", "HEAD", where=clone))
    old, own, others = commits
    given = replace(task, replaces=old)
    reference = worker.reference_of(given)
    git("update-ref", reference, own, where=clone)
    git("push", "-q", "origin", f"{others if meanwhile == 'another' else old}:{reference}", where=clone)
    if meanwhile == "gone":
        origin.rename(tmp_path / "gone")
    with (tmp_path / "log").open("w") as log:
        shell = worker._Shell(clone, log, ENVIRONMENT)
        if meanwhile == "gone":
            with pytest.raises(worker.CommandError, match="git push -q exited with"):
                worker._hand_over(given, shell)
        else:
            worker._hand_over(given, shell)
            assert git("rev-parse", reference, where=origin) == (own if meanwhile == "nothing" else others)


def test_what_a_killed_run_left_in_a_clone_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "PAUSE", 0.05)
    clone = tmp_path / "point"
    clone.mkdir()
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=clone)
    entered = threading.Event()

    def enter() -> None:
        with worker._alone(clone):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(1)
    left.kill()
    left.wait()
    assert entered.wait(20)
    waiting.join()


def test_two_workers_never_have_one_clone(task, tmp_path, monkeypatch):
    """The first removes the file of its lock: who waits for that one must not be in the clone with who makes another."""
    lock, inside, most, ended = tmp_path / "work/point.lock", [], [], []

    def prepare(task, shell) -> None:
        inside.append(1)
        most.append(len(inside))
        shell.clone.mkdir()
        time.sleep(0.3)
        inside.pop()

    monkeypatch.setattr(worker, "_processes_in", lambda _: [])
    monkeypatch.setattr(worker, "_prepare", prepare)
    for step in ("_experiment", "_hand_over"):
        monkeypatch.setattr(worker, step, lambda *_: None)
    threads = [threading.Thread(target=lambda: ended.append(worker.run(task))) for _ in range(4)]
    for thread in threads[:3]:
        thread.start()
    until(lambda: ended)  # and two wait, of which one enters
    threads[3].start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert [outcome.error for outcome in ended] == [None] * 4
    assert not lock.exists()


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
