"""Run a sweep on a Ray cluster: one on this machine that lives as long as the sweep, or one that is there."""

import importlib
import importlib.util
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, SparsesweepError
from stages.sweeps import local, running, worker
from stages.sweeps.file import Resources
from stages.sweeps.plan import Plan, Point
from stages.sweeps.worker import Outcome, Task

RETRIES = 3  # of a point whose worker or node was lost
STORE = 100 * 2**20  # bytes of memory for objects on their way; there are none but the tasks
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}  # as the next, read when Ray is imported
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's switch, on every system, for clusters of one machine: all listens on loopback
AUTHENTICATION, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray looks for it, too


def client(address: str | None) -> Any:
    """Import Ray, which reports nothing to its maker.

    Args:
        address: of a cluster that is there, to which the user's token is shown if there is one; None: one on this machine, which then is
            bound to loopback and lets in nobody without a token made for it.

    Raises:
        ConfigError: it is not installed; names the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("found no package ray, wanted it for --ray and --address: pip install -c constraints.txt -e '.[ray]' brings it")
    os.environ.update(QUIET)
    if address is None:
        os.environ.update(LOOPBACK | {AUTHENTICATION: "token", TOKEN: secrets.token_hex(32)})
    elif any(name in os.environ for name in (TOKEN, TOKEN_PATH)) or TOKEN_FILE.expanduser().is_file():
        os.environ.setdefault(AUTHENTICATION, "token")
    return importlib.import_module("ray")


@contextmanager
def cluster(ray: Any, address: str | None) -> Iterator[None]:
    """A cluster to hand points to.

    Args:
        address: HOST:PORT of a cluster that is there; None: one on this machine, bound to loopback, ended with the block.

    Raises:
        SparsesweepError: no cluster answers there.
    """
    settings: dict[str, Any] = {"runtime_env": {"py_modules": [str(Path(worker.__file__).parents[1])]}, "log_to_driver": False}
    if address is None:
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": STORE}
    else:
        settings |= {"address": address}
    try:
        ray.init(**settings, logging_level="error")
    except (ConnectionError, ray.exceptions.RayError, ValueError) as error:
        raise SparsesweepError(f"--address {address}: no Ray cluster answers there ({' '.join(str(error).split())})") from None
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_each(ray: Any, plan: Plan, resources: Resources) -> int:
    """GPUs of each point, see local.gpus_of_each; available where the cluster has any."""
    return local.gpus_of_each(plan, resources, available=ray.cluster_resources().get("GPU", 0) > 0)


def run(ray: Any, plan: Plan, tasks: dict[str, Task], resources: Resources) -> Iterator[Outcome]:
    """Run the points of a plan on the cluster that is connected. A lost worker's point is given to another.

    Args:
        tasks: by name of the point.
    """
    gpus = gpus_of_each(ray, plan, resources)
    _require_fits(ray, resources, gpus)
    memory = {} if resources.memory_gib is None else {"memory": int(resources.memory_gib * 2**30)}
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_retries=RETRIES, **memory)(worker.run)

    def submit(point: Point) -> "Future[Outcome]":
        task = tasks[point.name] if gpus else replace(tasks[point.name], cards="")
        future: Future[Outcome] = remote.options(name=point.name).remote(task).future()
        return future

    yield from running.run(plan, submit, (ray.exceptions.RayError,))


def _require_fits(ray: Any, resources: Resources, gpus: int) -> None:
    """Refuse a point that no node can ever take: Ray would wait for ever.

    Raises:
        ConfigError: names what is declared, and what the largest node has.
    """
    wanted = {"CPU": resources.cpus, "GPU": gpus, "memory": (resources.memory_gib or 0) * 2**30}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= number for name, number in wanted.items()) for node in nodes):
        has = "; ".join(
            f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, {node.get('memory', 0) / 2**30:.1f} GiB" for node in nodes
        )
        declared = f"{resources.cpus} CPUs, {gpus} GPUs, {resources.memory_gib or 0:g} GiB"
        raise ConfigError(f"resources of a point: found {declared}, wanted what one node has: {has}")
