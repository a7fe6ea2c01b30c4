"""What `python -m stages.sweep` does, by its arguments."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from stages.errors import ConfigError, SparsesweepError
from stages.experiments import table
from stages.experiments.reading import Experiment, Missing, read_experiments
from stages.schema import require
from stages.sharing.references import of_origin
from stages.sharing.remote import checked, project
from stages.sweeps import cluster, git, local, search, slurm, worker
from stages.sweeps.file import Resources, Search, Sweep, read_sweep
from stages.sweeps.plan import Plan, Point, beginning_of, plan, points_of, summary, text
from stages.sweeps.running import executed, progress
from stages.sweeps.search import Step
from stages.sweeps.worker import Outcome, Task

REMOTE = "origin"
JOBS = 1
NODE_DIRECTORY = "~/.cache/sparsesweep"
TOGETHER = "points are evaluated side by side once all of them are pruned on this machine"
WITHOUT_JOBS = {  # option -> why it goes without --jobs
    "ray": "the cluster's processors and GPUs say how many run at once",
    "address": "the cluster's processors and GPUs say how many run at once",
    "slurm": "SLURM says how many run at once",
    "point": "one is run",
}


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask.

    Returns:
        The exit code: 1 if a point failed.

    Raises:
        SparsesweepError: the sweep cannot start.
    """
    sweep = read_sweep(arguments.file)
    _require_used(sweep, arguments)
    arguments.jobs = JOBS if arguments.jobs is None else arguments.jobs
    require(arguments.jobs >= 1, "--jobs", arguments.jobs, "1 or more")
    resources = _resources(sweep.resources, arguments)
    if sweep.search is not None:
        return _search(sweep, sweep.search, resources, arguments)
    revision = _revision(arguments)
    share = arguments.share or arguments.address is not None
    if share and not arguments.dry_run:
        _require_shared(revision, elsewhere=arguments.address is not None)
    if arguments.point is not None:
        return _one_point(sweep, arguments.point, resources, revision, share=share)
    if share:
        git.fetch_experiments(REMOTE, [point.name for point in points_of(sweep)])
    read = read_experiments()
    made = plan(sweep, read[0], revision)
    if arguments.dry_run:
        print(text(made, at_once=arguments.jobs))
        return 0
    if arguments.slurm is not None:
        return _script(made, resources, arguments.slurm, revision, share=share)
    _say(summary(made, at_once=None if arguments.ray or arguments.address else arguments.jobs))
    outcomes = progress(made, _outcomes(made, resources, arguments, revision, share=share), say=_say) if made.to_run else []
    if share:
        git.fetch_experiments(REMOTE, [point.name for point in made.points], ran=[outcome.name for outcome in outcomes])
    if outcomes:
        read = read_experiments()
        made = plan(sweep, read[0], revision)
    if share and (own := _not_shared(made)):
        _say(f"{len(own)} points were there and are not on {REMOTE}: `make share` shares them")
    return _report(made, outcomes, read[1])


def _search(sweep: Sweep, wanted: Search, resources: Resources, arguments: argparse.Namespace) -> int:
    """Run the points of a search, or say what is there of it and which is next."""
    alone = arguments.slurm is None and arguments.point is None
    require(alone, "--slurm, --point", "one of them", "neither: each point of a search waits for the one before")
    optuna = search.client()
    revision = _revision(arguments)
    share = arguments.share or arguments.address is not None
    if share and not arguments.dry_run:
        _require_shared(revision, elsewhere=arguments.address is not None)
    if share:
        git.fetch_experiments(REMOTE, [one.name for one in of_origin(REMOTE) if one.name.startswith(beginning_of(sweep))])
    if arguments.dry_run:
        print(search.text(wanted, list(search.steps(sweep, wanted, read_experiments()[0], None, revision))))
        return 0

    def run_point(made: Plan) -> Sequence[Experiment]:
        for outcome in progress(made, _outcomes(made, resources, arguments, revision, share=share), say=_say):
            if outcome.error is not None:
                raise SparsesweepError(f"{outcome.name}: {outcome.error}")
        if share:
            names = [point.name for point in made.points]
            git.fetch_experiments(REMOTE, names, ran=names)
        return read_experiments()[0]

    found: list[Step] = []
    for step in search.steps(sweep, wanted, read_experiments()[0], run_point, revision):
        found.append(step)
        _say(f"{wanted.parameter}={step.value}: {search.answer(wanted, found)}")
    _say(f"\n{search.text(wanted, found)}\nOptuna's study: {search.record(optuna, sweep, wanted, found)}")
    return 0


def _revision(arguments: argparse.Namespace) -> str:
    """The commit that the points run; a dry run lists them where not all is committed, too.

    A point that is named by its name is the one that is meant wherever it composes, since the hash in it is of what it composes.
    """
    if arguments.revision is None and not arguments.dry_run:
        return git.require_committed()
    revision = git.commit_of(arguments.revision or "HEAD")
    if arguments.revision is not None and (arguments.point is None or arguments.point.isdecimal()):
        git.require_composed_from(revision)
    return revision


def _resources(declared: Resources, arguments: argparse.Namespace) -> Resources:
    """What the file declares, where the command line does not say otherwise."""
    given = {"gpus": arguments.gpus, "cpus": arguments.cpus, "memory_gib": arguments.memory, "threads": arguments.threads}
    resources = Resources(**{**asdict(declared), **{key: value for key, value in given.items() if value is not None}})
    resources.check("command line: resources")
    return resources


def _require_used(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Refuse options that say nothing of how the points of this sweep run."""
    reasons = {f"--{option}": reason for option, reason in WITHOUT_JOBS.items() if getattr(arguments, option)}
    if sweep.search is not None:
        reasons["a search"] = "each of its points waits for the one before"
    for way, reason in reasons.items():
        require(arguments.jobs is None, "--jobs", arguments.jobs, f"none with {way}: {reason}")
        if arguments.together:
            raise ConfigError(f"--together: found {way}, too, wanted one of them: {TOGETHER}")
    used = arguments.node_directory is None or arguments.address is not None
    wanted = f"none without --address: points of this machine have their clones in {local.DIRECTORY}"
    require(used, "--node-directory", arguments.node_directory, wanted)


def _require_shared(revision: str, *, elsewhere: bool) -> None:
    """Refuse to share what others cannot clone, or by remotes by which nobody can share.

    Args:
        elsewhere: whether the points run on machines that have no cache in common.
    """
    git.require_at(REMOTE, revision)
    with project() as repo:
        remotes = checked(repo, writable=not elsewhere)  # the nodes write there, with credentials of their own
    shared = remotes.dvc is not None or not elsewhere
    require(shared, "--address", "no DVC remote but a shared cache", "a DVC remote: each node has a cache of its own")


def _outcomes(plan: Plan, resources: Resources, arguments: argparse.Namespace, revision: str, *, share: bool) -> Iterator[Outcome]:
    tasks = local.tasks(plan.to_run, plan.sweep.target, resources, revision, share=share)
    if arguments.address is not None:
        tasks = _elsewhere(tasks, arguments.node_directory or NODE_DIRECTORY)
    elif share:
        tasks = {name: replace(task, origin=git.url(REMOTE)) for name, task in tasks.items()}
    tasks = _for_team(tasks) if share else tasks
    if arguments.ray or arguments.address:
        return _on_cluster(plan, tasks, resources, arguments.address)
    run_all = partial(local.run_together, say=_say) if arguments.together else local.run
    return run_all(plan, tasks, resources, at_once=arguments.jobs)


def _for_team(tasks: dict[str, Task]) -> dict[str, Task]:
    """The same tasks, which take the place of what the git remote has of their experiments now, and of nothing that comes meanwhile."""
    there = {reference.path: reference.commit for reference in of_origin(REMOTE)}
    return {name: replace(task, replaces=there.get(worker.reference_of(task), "")) for name, task in tasks.items()}


def _on_cluster(plan: Plan, tasks: dict[str, Task], resources: Resources, address: str | None) -> Iterator[Outcome]:
    ray = cluster.client(address)
    with cluster.cluster(ray, address):
        yield from cluster.run(ray, plan, tasks, resources)


def _elsewhere(tasks: dict[str, Task], directory: str) -> dict[str, Task]:
    """The same tasks for machines that share nothing with this one but the remotes: each has a cache of its own."""
    url, work, cache = git.url(REMOTE), f"{directory}/work", f"{directory}/cache"
    return {name: replace(task, origin=url, directory=work, cache=cache, configuration={}) for name, task in tasks.items()}


def _one_point(sweep: Sweep, wanted: str, resources: Resources, revision: str, *, share: bool) -> int:
    """Run one point in this process, with the cards that this process sees, none where none are wanted."""
    point = _point(sweep, wanted)
    task = local.tasks([point], sweep.target, resources, revision, share=share)[point.name]
    task = replace(task, cards="") if resources.gpus == 0 else task
    if share:
        (task,) = _for_team({point.name: replace(task, origin=git.url(REMOTE))}).values()
    outcome = worker.run(task)
    _say(f"{outcome.name}: {f'failed: {outcome.error}' if outcome.error else f'done, {executed(outcome)}'}")
    return int(outcome.error is not None)


def _point(sweep: Sweep, wanted: str) -> Point:
    """A point by its number or its name.

    Raises:
        ConfigError: there is none; the sweep file or conf/ may have changed.
    """
    points = points_of(sweep)
    for point in points:
        if wanted in (point.name, str(point.index)):
            return point
    names = f"a number from 0 to {len(points) - 1} or a name that --dry-run shows"
    raise ConfigError(f"--point: found {wanted!r}, wanted {names}; has the sweep file or conf/ changed since?")


def _script(plan: Plan, resources: Resources, path: Path, revision: str, *, share: bool) -> int:
    """Write the script for SLURM, and say how it is submitted."""
    if not plan.to_run:
        _say(summary(plan, at_once=None))
        return 0
    local.DIRECTORY.mkdir(parents=True, exist_ok=True)  # in which SLURM writes its logs, if it is there
    path.write_text(slurm.script(plan, slurm.with_gpus(plan, resources), revision, path, share=share), encoding="utf8")
    _say(f"{summary(plan, at_once=None)}\nwrote {path}; submit it by")
    for line in slurm.submission(plan, path):
        _say(f"  {line}")
    return 0


def _not_shared(plan: Plan) -> list[Experiment]:
    """The results of a plan that are not on the git remote."""
    there = {known for reference in of_origin(REMOTE) for known in (reference.commit, reference.name)}
    return [one for one in plan.results.values() if not there & {one.revision, one.name}]


def _report(plan: Plan, outcomes: Sequence[Outcome], missing: Sequence[Missing]) -> int:
    """Show the points of the sweep that have results, best first, and why the others have none."""
    names = {point.name for point in plan.to_run}
    own = list({one.revision: one for one in plan.results.values()}.values())
    _say("\n" + table.text(own, [one for one in missing if one.name in names], commands=False))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        _say(f"failed {outcome.name}: {outcome.error}\n")
    return int(bool(failed))


def _say(line: str) -> None:
    print(line, flush=True)
