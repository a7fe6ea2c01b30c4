"""Run the points of a plan, each as soon as what it waits for is done, and say how far it is."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from stages.sweeps.plan import Plan, Point, duration
from stages.sweeps.worker import Outcome

Submit = Callable[[Point], "Future[Outcome]"]


def run(plan: Plan, submit: Submit, failures: tuple[type[Exception], ...] = ()) -> Iterator[Outcome]:
    """Hand out the points of a plan and yield what comes of each, in the order in which they end.

    A point of which another shares stages is ended when it failed, too: the other then computes them itself.

    Args:
        submit: starts a point. failures: what the future of a point may raise when it was lost.
    """
    pending, running = plan.to_run, dict[Future[Outcome], Point]()
    ended: set[str] = set()
    while pending or running:
        ready = [point for point in pending if plan.after[point.name] <= ended]
        pending = [point for point in pending if point not in ready]
        running |= {submit(point): point for point in ready}
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            point = running.pop(future)
            ended.add(point.name)
            yield _outcome(future, point, failures)


def _outcome(future: "Future[Outcome]", point: Point, failures: tuple[type[Exception], ...]) -> Outcome:
    try:
        return future.result()
    except failures as error:
        return Outcome(name=point.name, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


def progress(plan: Plan, outcomes: Iterator[Outcome], *, say: Callable[[str], None]) -> list[Outcome]:
    """Say what came of each point and how long the others will take, by the time that passed so far."""
    made: list[Outcome] = []
    started, total = time.monotonic(), len(plan.to_run)
    for outcome in outcomes:
        made.append(outcome)
        left = (time.monotonic() - started) / len(made) * (total - len(made))
        came = "failed" if outcome.error else f"done in {duration(outcome.seconds)}, {executed(outcome)}"
        say(f"{len(made)}/{total} {outcome.name}: {came}" + (f"; about {duration(left)} left" if len(made) < total else ""))
    return made


def executed(outcome: Outcome) -> str:
    """Which stages of a point were executed and not restored."""
    return f"ran {', '.join(outcome.stages)}" if outcome.stages else "computed nothing"
