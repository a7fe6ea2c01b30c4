"""A sweep on this machine, in a worktree: nothing twice, nothing lost by a kill, and nothing that git does not know."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stages import sweep
from stages.errors import ConfigError
from stages.sweeps import command, local
from stages.sweeps.file import Resources, read_sweep
from stages.sweeps.pipeline import keys, stages_of
from stages.sweeps.plan import Plan, Point, points_of

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


def test_a_killed_sweep_whose_points_were_pruned_together_goes_on(worktree):
    points = worktree.write("pruned.yaml", SWEEP.replace("0.5, 0.6", "0.15, 0.25"))
    worktree.held.touch()
    sweep = worktree.sweep(points, "--together", STAND_IN_HOLDS="evaluate_sparse")
    sweep.until(lambda: worktree.executing("evaluate_sparse"))
    sweep.kill()
    worktree.held.unlink()
    code, output = worktree.sweep(points, "--together").finished()
    assert code == 0, output
    assert len(re.findall(r"^\d/2 pruned-\S+: pruned in \d+ s$", output, re.M)) == 2, output
    assert len([name for name in worktree.experiments() if name.startswith("pruned-")]) == 2
    code, output = worktree.sweep(points, "--together").finished()
    assert code == 0
    assert "pruned in" not in output


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


def test_points_that_cannot_be_evaluated_side_by_side_are_evaluated_each_alone_and_it_is_said(worktree):
    points = worktree.write("together.yaml", SWEEP.replace("0.5, 0.6", "0.35, 0.45"))
    code, output = worktree.sweep(points, "--together").finished()
    assert code == 0, output
    assert "2 points not evaluated side by side: python -m stages.evaluate_together exited with 1" in output
    assert "artifacts/base" in output.split("exited with 1")[1].split("its log")[0]  # of which a stand-in has nothing
    for number in (1, 2):
        (came,) = re.findall(rf"^{number}/2 together\S+: done in (.*)$", output, re.M)
        assert {"prune", "evaluate_sparse"} <= set(re.split(r"[ ,;]+", came)), came
    left = [path for path in (worktree.root / ".dvc/tmp/sweeps").glob("together-*")]
    assert [path.suffix for path in left] == [".log"]
    assert str(left[0]) in output


def test_points_of_one_evaluation_are_evaluated_together_in_even_parts_and_none_that_is_known_twice_or_alone(tmp_path):
    path, sparsities = tmp_path / "many.yaml", [round(0.3 + number / 50, 2) for number in range(18)]
    alone, same = "[evaluation=sweep, pattern.sparsity=0.5]", "[publish.name=other, pattern.sparsity=0.5]"
    listed = [alone, same, *(f"[pattern.sparsity={sparsity}]" for sparsity in sparsities)]
    path.write_text(f"target: publish\npoints: [{', '.join(listed)}]\n")
    sweep = read_sweep(path)
    points = points_of(sweep)
    assert len(points) == len(listed)
    known = keys(stages_of("publish"), points[2].params)["evaluate_sparse"]
    made = Plan(sweep=sweep, points=points, results={}, after={}, seconds={}, available=frozenset({known}))
    groups = local.evaluated_alike(made)
    assert [len(group) for group in groups] == [9, 8]
    assert {point.index for group in groups for point in group} == set(range(1, 20)) - {2, 2 + sparsities.index(0.5)}


# Sharing.


def test_an_experiment_whose_files_were_not_sent_is_not_named_and_the_same_command_sends_both(project, tmp_path):
    points = project.write("shared.yaml", SWEEP.replace("0.5, 0.6", "0.7"))
    files = project.root.parent / "remote/files"
    files.write_text("nothing can be written below it")
    code, output = project.sweep(points, "--share").finished()
    assert code == 1
    assert "dvc push --run-cache exited with" in output
    assert project.experiments("ls-remote", "origin") == set()
    files.unlink()
    code, output = project.sweep(points, "--share").finished()
    assert code == 0, output
    assert "computed nothing" in output
    (name,) = project.experiments("ls-remote", "origin")
    assert name.startswith("shared-")
    lock = project.git("show", f"{project.git('ls-remote', 'origin', f'refs/exps/*/{name}').split()[0]}:dvc.lock")
    assert {one["md5"] for stage in yaml.safe_load(lock)["stages"].values() for one in stage["outs"]} <= objects(files)
    second = replace(project, root=tmp_path / "second")
    project.git("clone", "-q", str(project.root.parent / "origin.git"), str(second.root))
    for share, listed in ([], "0 there already, 1 to run"), (["--share"], "1 there already, 0 to run"):
        code, output = second.sweep(points, "--dry-run", *share).finished()
        assert code == 0, output
        assert f"1 points: {listed}" in output


def objects(files: Path) -> set[str]:
    """The hashes of the files of a DVC remote or cache."""
    return {"".join(path.parts[-2:]) for path in (files / "md5").glob("??/*")}


def test_a_remote_by_which_nobody_can_share_is_refused(project):
    points, remote = project.write("refused.yaml", SWEEP), project.root.parent / "remote"
    moved = remote.rename(remote.with_name("unmounted"))
    code, output = project.sweep(points, "--share").finished()
    moved.rename(remote)
    assert code == 1
    assert f"error: remote shared: found no directory {remote}, wanted one that is there: is its disk mounted?" in output


def test_a_team_that_has_one_cache_and_no_remote_shares_by_it(project, tmp_path):
    first, second, origin = (tmp_path / name for name in ("first", "second", "origin.git"))
    project.git("clone", "-q", "--bare", str(project.root.parent / "origin.git"), str(origin))
    cache = tmp_path / "cache"
    for root in (first, second):
        project.git("clone", "-q", str(origin), str(root))
        if root == first:
            config = first / ".dvc/config"
            config.write_text(config.read_text().partition("['remote")[0].replace("    remote = shared\n", ""))
            project.git("-C", str(first), "commit", "-q", "-a", "-m", "One cache")
            project.git("-C", str(first), "push", "-q", "origin", "main")
        (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n")
    points = project.write("one_cache.yaml", SWEEP.replace("0.5, 0.6", "0.5"))
    code, output = replace(project, root=first).sweep(points, "--share").finished()
    assert code == 0, output
    code, output = replace(project, root=second).sweep(points, "--share").finished()
    assert code == 0, output
    assert "1 there already, 0 to run" in output
    code, output = replace(project, root=first).sweep(points, "--address", "127.0.0.1:1").finished()
    assert code == 1
    assert "error: --address: found 'no DVC remote but a shared cache', wanted a DVC remote: each node has a cache of its own" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "2", "--ray"], "--jobs: found 2, wanted none with --ray: the cluster's processors and GPUs say how many run at once"),
        (["--jobs", "2", "--address", "a:1"], "--jobs: found 2, wanted none with --address"),
        (["--jobs", "2", "--slurm", "out"], "--jobs: found 2, wanted none with --slurm: SLURM says how many run at once"),
        (["--jobs", "2", "--point", "0"], "--jobs: found 2, wanted none with --point: one is run"),
        (
            ["--together", "--ray"],
            "--together: found --ray, too, wanted one of them: points are evaluated side by side once all of them are",
        ),
        (["--together", "--point", "0"], "--together: found --point, too, wanted one of them"),
        (["--node-directory", "a", "--ray"], "--node-directory: found 'a', wanted none without --address: points of this machine"),
        (["--jobs", "0"], "--jobs: found 0, wanted 1 or more"),
    ],
)
def test_an_option_that_says_nothing_of_how_points_run_is_refused(options, message, tmp_path):
    points = tmp_path / "points.yaml"
    points.write_text(SWEEP)
    with pytest.raises(ConfigError, match=re.escape(message)):
        command.run(sweep._parser().parse_args([str(points), *options]))


def test_a_search_goes_without_jobs(tmp_path):
    points = tmp_path / "points.yaml"
    points.write_text("search: {parameter: pattern.sparsity, low: 0.2, high: 0.8, metric: perplexity, limit: 2.5, points: 3}\n")
    with pytest.raises(ConfigError, match="--jobs: found 2, wanted none with a search: each of its points waits for the one before"):
        command.run(sweep._parser().parse_args([str(points), "-j", "2"]))


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


@pytest.mark.parametrize(("options", "cards"), [(["--gpus", "0"], ""), (["--gpus", "1"], None), ([], None)])
def test_a_single_point_that_is_to_have_no_card_sees_none(tmp_path, monkeypatch, options, cards):
    points, ran = tmp_path / "points.yaml", []
    points.write_text(SWEEP)

    def run(task):
        ran.append(task.cards)
        return local.Outcome(name=task.name, error=None)

    monkeypatch.setattr(command.git, "require_committed", lambda: "a" * 40)
    monkeypatch.setattr(command.worker, "run", run)
    assert command.run(sweep._parser().parse_args([str(points), "--point", "0", *options])) == 0
    assert ran == [cards]


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
