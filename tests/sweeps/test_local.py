"""A sweep on this machine, in a worktree: nothing twice, nothing lost by a kill, and nothing that git does not know."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.sweeps import local
from stages.sweeps.file import Resources
from stages.sweeps.plan import Plan, Point

SWEEP = "overrides: [evaluation=sweep]\ngrid: {pattern.sparsity: [0.5, 0.6]}\n"


@pytest.fixture(scope="module")
def worktree(project):
    """A worktree of the project, on a commit that no branch has."""
    path = project.root.parent / "worktree"
    project.git("worktree", "add", "-q", "--detach", str(path))
    project.git("-C", str(path), "commit", "-q", "--allow-empty", "-m", "Of the worktree alone")
    made = replace(project, root=path)
    yield made
    made.end()


def test_a_file_that_git_does_not_know_stops_the_sweep_and_is_named(worktree):
    points = worktree.write("new.yaml", SWEEP)
    option, changed = worktree.root / "conf/method/mine.yaml", worktree.root / "conf/pattern/nm_2_4.yaml"
    before = changed.read_text()
    option.write_text((worktree.root / "conf/method/wanda.yaml").read_text())
    changed.write_text(before + "# changed\n")
    code, output = worktree.sweep(points).finished()
    option.unlink()
    changed.write_text(before)
    assert code == 1
    assert "error: found conf/pattern/nm_2_4.yaml, conf/method/mine.yaml (new), wanted them committed" in output


def test_a_killed_sweep_goes_on_and_a_second_call_computes_nothing(worktree):
    points = worktree.write("killed.yaml", SWEEP)
    worktree.held.touch()
    sweep = worktree.sweep(points, "-j", "2", STAND_IN_HOLDS="evaluate_sparse")
    sweep.until(lambda: worktree.executing("evaluate_sparse"))
    sweep.kill()
    again = worktree.sweep(points, "-j", "2")
    again.until(lambda: "2 to run" in again.output)
    worktree.held.unlink()  # the stage that the kill left goes on, and its result is taken
    code, output = again.finished()
    assert code == 0, output
    assert "computed nothing" in output.split("1/2")[1].split("\n")[0]
    assert "ran prune, evaluate_sparse" in output.split("2/2")[1].split("\n")[0]
    names = {name for name in worktree.experiments() if name.startswith("killed-")}
    assert len(names) == 2
    assert all(f"\n{name} " in output for name in names)
    code, output = worktree.sweep(points, "--dry-run").finished()
    assert code == 0, output
    assert "2 points: 2 there already, 0 to run" in output


def test_a_point_that_fails_is_named_with_its_reason_and_its_log_and_the_others_run(worktree):
    points = worktree.write("fails.yaml", SWEEP.replace("0.5, 0.6", "0.3, 0.4"))
    code, output = worktree.sweep(points, STAND_IN_FAILS="0.4").finished()
    assert code == 1
    failed = next(line for line in output.splitlines() if line.startswith("failed fails-0.4-"))
    assert "dvc exp run exited with" in failed
    assert "asked to fail" in output
    log = Path(output.split("its log: ")[1].split("\n")[0])
    assert "$ dvc exp run --pull --allow-missing --name fails-0.4-" in log.read_text()
    assert "\nfails-0.3-" in output


# Cards.


@pytest.fixture()
def planned():
    """A plan of points whose devices are these."""

    def make(*devices: str, processes: int = 1) -> Plan:
        params = [{"prune": {"device": device, "processes": processes}, "evaluation": {"device": device}} for device in devices]
        points = tuple(Point(index=i, name=str(i), overrides=(), varied=(), params=of) for i, of in enumerate(params))
        return Plan(sweep=None, points=points, results={}, after={point.name: frozenset() for point in points}, seconds={})

    return make


@pytest.mark.parametrize(
    ("devices", "gpus", "cards", "at_once", "each"),
    [
        (["auto", "cpu"], None, ["0", "1"], 2, 1),
        (["cpu", "cpu"], None, ["0"], 2, 0),
        (["auto"], None, [], 4, 0),
        (["auto"], 2, ["0", "1"], 1, 2),
    ],
)
def test_a_point_gets_one_card_where_there_is_one_and_it_would_use_it(planned, devices, gpus, cards, at_once, each):
    assert local.cards_of_each(planned(*devices), Resources(gpus=gpus), cards, at_once) == each


@pytest.mark.parametrize(("devices", "cards", "each"), [(["cpu", "auto"], 8, 4), (["cpu"], 8, 0), (["auto"], 0, 0)])
def test_a_point_of_several_processes_gets_a_card_for_each(planned, devices, cards, each):
    names = [str(card) for card in range(cards)]
    assert local.cards_of_each(planned(*devices, processes=4), Resources(), names, 1) == each


def test_fewer_cards_than_a_point_has_processes_are_refused(planned):
    message = "resources.gpus: found 2, wanted null, 0, or at least 4: prune.processes of a point are as many"
    with pytest.raises(ConfigError, match=message):
        local.cards_of_each(planned("auto", processes=4), Resources(gpus=2), ["0", "1", "2", "3"], 1)
    with pytest.raises(ConfigError, match=r"1 points at once: found 2 GPUs, wanted 4 for each: lower --jobs, --gpus or prune.processes"):
        local.cards_of_each(planned("auto", processes=4), Resources(), ["0", "1"], 1)
    assert local.cards_of_each(planned("auto", processes=4), Resources(gpus=0), ["0", "1"], 1) == 0


def test_more_points_at_once_than_cards_are_refused(planned):
    with pytest.raises(ConfigError, match="3 points at once: found 2 GPUs, wanted 1 for each: lower --jobs, --gpus or"):
        local.cards_of_each(planned("auto"), Resources(), ["0", "1"], 3)


def test_the_cards_are_those_that_the_user_lets_us_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.visible_cards() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_cards() == []


def test_no_two_points_have_the_same_card_at_once(planned, monkeypatch):
    """Of four points each waits within its work for another to be at work, too."""
    both = threading.Barrier(2, timeout=20)
    in_use: list[str] = []
    seen = []

    def work(task):
        in_use.append(task.cards)
        both.wait()
        seen.append(sorted(in_use))
        both.wait()
        in_use.remove(task.cards)
        return local.Outcome(name=task.name, error=None)

    monkeypatch.setattr(local.worker, "run", work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    plan = planned("auto", "auto", "auto", "auto")
    facts = {"overrides": (), "target": "t", "origin": "o", "revision": "r", "directory": "d", "cache": "c", "share": False, "threads": 1}
    tasks = {point.name: local.Task(name=point.name, cards=None, **facts) for point in plan.points}
    outcomes = list(local.run(plan, tasks, Resources(), at_once=2))
    assert {outcome.name for outcome in outcomes} == {"0", "1", "2", "3"}
    assert seen == [["3", "5"]] * 4
    monkeypatch.setattr(local.worker, "run", lambda task: local.Outcome(name=task.cards, error=None))
    (outcome,) = local.run(planned("cpu"), tasks, Resources(), at_once=1)
    assert outcome.name == ""
