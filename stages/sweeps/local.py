"""Run a sweep on this machine, several points at once if asked; each point in a clone of its own, all with this clone's cache."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import torch
from dvc.repo import Repo

from stages.errors import ConfigError
from stages.schema import require
from stages.sweeps import running, worker
from stages.sweeps.file import Resources
from stages.sweeps.pipeline import keys, stages_of
from stages.sweeps.plan import Plan, Point, duration
from stages.sweeps.worker import Outcome, Task

DIRECTORY = Path(".dvc/tmp/sweeps")
VISIBLE = "CUDA_VISIBLE_DEVICES"
DENSE_STAGE, SPARSE_STAGE = "evaluate_dense", "evaluate_sparse"
SIDE_BY_SIDE = 16  # points at most: the hidden states of all are on the disk at once, and one more shares what 16 share already


def tasks(points: Sequence[Point], target: str, resources: Resources, revision: str, *, share: bool) -> dict[str, Task]:
    """The tasks of points for workers that reach this clone and its cache, by name.

    Args:
        share: whether each goes to the DVC remote, too, when it is done, if there is one.
    """
    with Repo() as repo:
        share = share and "remote" in repo.config["core"]  # else the team has one cache
        cache, configuration = str(repo.cache.local_cache_dir), repo.config.read("local")
        remotes = repo.config["remote"]  # paths of them are relative to this clone in its files, and absolute here
    configuration["remote"] = {name: {**configuration.get("remote", {}).get(name, {}), "url": of["url"]} for name, of in remotes.items()}
    made = {}
    for point in points:
        made[point.name] = Task(
            name=point.name,
            overrides=point.overrides,
            target=target,
            origin=str(Path.cwd()),
            revision=revision,
            directory=str(DIRECTORY.absolute()),
            cache=cache,
            share=share,
            threads=resources.threads or resources.cpus,
            cards=None,
            configuration=configuration,
        )
    return made


def gpus_of_each(plan: Plan, resources: Resources, *, available: bool) -> int:
    """How many GPUs each point gets: as declared; else, where GPUs are available, as many as the point that uses most.

    Raises:
        ConfigError: fewer are declared than a point has processes on GPUs.
    """
    most = max(map(used_gpus, plan.to_run), default=0)
    if resources.gpus is None:
        return most if available else 0
    fits = resources.gpus == 0 or resources.gpus >= most
    require(fits, "resources.gpus", resources.gpus, f"null, 0, or at least {most}: prune.processes of a point are as many, each on its own")
    return resources.gpus


def used_gpus(point: Point) -> int:
    """On how many GPUs a point computes where there are any: one for each process of prune; evaluation takes one."""
    evaluation = int(point.params["evaluation"]["device"] != "cpu")
    prune = point.params["prune"]
    return evaluation if prune["device"] == "cpu" else prune["processes"]


def visible_cards() -> list[str]:
    """The GPUs of this machine that its user lets us see, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    return [str(index) for index in range(torch.cuda.device_count())] if named is None else [name for name in named.split(",") if name]


def cards_of_each(plan: Plan, resources: Resources, cards: Sequence[str], at_once: int) -> int:
    """How many cards each point gets, so that no two share one.

    Raises:
        ConfigError: there are not as many; or see gpus_of_each.
    """
    wanted = gpus_of_each(plan, resources, available=bool(cards))
    if wanted * at_once > len(cards):
        advice = "lower --jobs, --gpus or prune.processes"
        raise ConfigError(f"{at_once} points at once: found {len(cards)} GPUs, wanted {wanted} for each: {advice}")
    return wanted


def run(
    plan: Plan, made: dict[str, Task], resources: Resources, *, at_once: int, work: Callable[[Task], Outcome] | None = None
) -> Iterator[Outcome]:
    """Run the points of a plan.

    Args:
        made: their tasks, by name. at_once: how many run at once. work: what is done of each; None: all.
    """
    cards = visible_cards()
    each = cards_of_each(plan, resources, cards, at_once)
    free: SimpleQueue[str] = SimpleQueue()
    for card in cards:
        free.put(card)

    def with_cards(point: Point) -> Outcome:
        own = [free.get() for _ in range(each)]
        try:
            return (work or worker.run)(replace(made[point.name], cards=",".join(own) if cards else None))
        finally:
            for card in own:
                free.put(card)

    executor = ThreadPoolExecutor(at_once)

    def submit(point: Point) -> "Future[Outcome]":
        return executor.submit(with_cards, point)

    try:
        yield from running.run(plan, submit, (OSError,))
    finally:
        executor.shutdown(cancel_futures=True)


def run_together(plan: Plan, made: dict[str, Task], resources: Resources, *, at_once: int, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Run the points of a plan: they are pruned, then those of the same evaluation are scored side by side, then each is completed.

    What fails before a point is completed is said and tried again for it alone; so is what no other is evaluated with.

    Args:
        see run.

    Returns:
        What comes of each, as it is completed; the others are pruned and evaluated before this returns.
    """
    groups = evaluated_alike(plan)
    pruned: dict[str, Outcome] = {}
    first = plan.part([point for group in groups for point in group])
    for outcome in run(first, made, resources, at_once=at_once, work=worker.prune):
        pruned[outcome.name] = outcome
        came = f"not pruned with the others: {outcome.error}" if outcome.error else f"pruned in {duration(outcome.seconds)}"
        say(f"{len(pruned)}/{len(first.points)} {outcome.name}: {came}")
    cards = visible_cards()
    own = ",".join(cards[: cards_of_each(plan, resources, cards, 1)]) if cards else None
    shares: dict[str, float] = {}
    for group in groups:
        tasks = [replace(made[point.name], cards=own) for point in group if pruned[point.name].error is None]
        if len(tasks) > 1:
            shares |= _evaluated(tasks, say)

    def in_all(outcome: Outcome) -> Outcome:
        earlier = pruned.get(outcome.name, Outcome(name=outcome.name, error=None))
        stages = tuple(dict.fromkeys([*earlier.stages, *outcome.stages]))
        return replace(outcome, stages=stages, seconds=earlier.seconds + shares.get(outcome.name, 0) + outcome.seconds)

    return map(in_all, run(plan, made, resources, at_once=at_once))


def _evaluated(tasks: Sequence[Task], say: Callable[[str], None]) -> dict[str, float]:
    """Evaluate points side by side. Returns: the seconds of each."""
    try:
        names, outcome = worker.evaluate_together(tasks)
    except OSError as error:
        say(f"{len(tasks)} points not evaluated side by side: {error}")
        return {}
    if len(names) < 2:  # the others' experiments were recorded by an earlier run
        return {}
    if outcome.error is not None:
        say(f"{len(names)} points not evaluated side by side: {outcome.error}")
    else:
        say(f"{len(names)} points evaluated side by side in {duration(outcome.seconds)}")
    return dict.fromkeys(names, outcome.seconds / len(names))


def evaluated_alike(plan: Plan) -> list[list[Point]]:
    """The points to be evaluated, together those of which the dense model's evaluation is the same, at most SIDE_BY_SIDE of them.

    Neither those whose evaluation this clone has, nor two of the same, nor any that is alone.
    """
    stages, groups, known = stages_of(plan.sweep.target), dict[str, list[Point]](), set(plan.available)
    for point in plan.to_run:
        of_point = keys(stages, point.params)
        if of_point[SPARSE_STAGE] not in known:
            known.add(of_point[SPARSE_STAGE])
            groups.setdefault(of_point[DENSE_STAGE], []).append(point)
    return [part for group in groups.values() for part in _parts(group) if len(part) > 1]


def _parts(group: list[Point]) -> list[list[Point]]:
    """As few as there can be, as even as can be."""
    number = math.ceil(len(group) / SIDE_BY_SIDE)
    return [group[index::number] for index in range(number)]
