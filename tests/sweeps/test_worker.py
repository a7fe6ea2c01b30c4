"""What a worker does on a machine, beside running DVC."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from stages.sweeps import worker
from stages.sweeps.worker import Task


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
        subprocess.run(["git", "init", "-q", "-b", "main", str(origin)], check=True)
        (origin / ".dvc").mkdir()
        (origin / ".dvc/config").write_text("")
        author = ("-c", "user.name=a", "-c", "user.email=a@localhost")
        subprocess.run(["git", *author, "add", "-A"], cwd=origin, check=True)
        subprocess.run(["git", *author, "commit", "-q", "-m", origin.name], cwd=origin, check=True)
    subprocess.run(["git", "clone", "-q", str(first), str(clone)], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=second, check=True, capture_output=True, text=True).stdout.strip()
    with (tmp_path / "log").open("w") as log:
        asked = replace(task, origin=str(second), revision=head)
        worker._prepare(asked, clone, worker._Shell(clone, log, worker._environment(asked)))
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True).stdout.strip() == head


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


def test_two_workers_never_have_one_clone(tmp_path):
    clone, inside = tmp_path / "point", []

    def enter() -> None:
        with worker._alone(clone):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
