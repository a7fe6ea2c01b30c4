"""A sweep on a Ray cluster: what listens where, and what a kill of a worker, the driver or a node costs. All of it on loopback."""

import importlib.util
import os
import signal
import sys

import psutil
import pytest

from stages.errors import ConfigError
from stages.sweeps import cluster
from stages.sweeps.file import Resources
from stages.sweeps.plan import Plan, Point
from tests.sweeps.conftest import PATIENCE, Project

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)
# Ray keeps to loopback where it may have one node alone; a second one is let in here, with loopback as the address of every node.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
RAY = """
from ray._private import ray_constants, services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
import ray.util
ray.util.get_node_ip_address = services.get_node_ip_address
ray_constants.ENABLE_RAY_CLUSTER = True
from ray.scripts.scripts import main
main()
"""


def file(project: Project, name: str, sparsities: str) -> str:
    return project.write(f"{name}.yaml", f"overrides: [evaluation=sweep]\ngrid: {{pattern.sparsity: {sparsities}}}\n")


def workers(process: psutil.Process) -> list[psutil.Process]:
    """The Ray workers above a stage."""
    return [parent for parent in process.parents() if parent.name().startswith("ray::")]


def _is_of_ray(process: psutil.Process) -> bool:
    try:
        return process.name().startswith(("ray", "gcs"))
    except psutil.Error:
        return False


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses on which processes accept connections."""
    found = set()
    for process in processes:
        found |= {connection.laddr.ip for connection in process.net_connections("inet") if connection.status == psutil.CONN_LISTEN}
    return found


def test_a_killed_worker_is_replaced_and_all_listens_on_loopback_alone(project):
    project.held.touch()
    sweep = project.sweep(file(project, "worker", "[0.5, 0.6]"), "--ray", STAND_IN_HOLDS="prune")
    sweep.until(lambda: project.executing("prune"))
    assert listening(sweep.tree()) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    (worker,) = workers(project.executing("prune")[0])
    worker.kill()
    project.held.unlink()
    code, output = sweep.finished()
    assert code == 0, output
    assert "2/2 worker-" in output
    assert "ran prune, evaluate_dense, evaluate_sparse" in output  # what was computed before the kill is not computed again
    assert len({name for name in project.experiments() if name.startswith("worker-")}) == 2
    assert list((project.root / ".dvc/tmp/sweeps").iterdir()) == []


def test_what_a_killed_driver_left_is_ended_and_the_same_command_goes_on(project):
    project.held.touch()
    points = file(project, "driver", "[0.3, 0.4]")
    sweep = project.sweep(points, "--ray", STAND_IN_HOLDS="prune")
    sweep.until(lambda: project.executing("prune"))
    tree = sweep.tree()
    sweep.kill()
    _, alive = psutil.wait_procs([one for one in tree if _is_of_ray(one)], timeout=PATIENCE)
    assert not alive
    project.held.unlink()
    code, output = project.sweep(points, "--ray").finished()
    assert code == 0, output
    assert "0 there already, 2 to run" in output
    code, output = project.sweep(points, "--ray").finished()
    assert code == 0, output
    assert "2 there already, 0 to run" in output


def test_a_cluster_that_is_there_shares_every_point_and_survives_the_loss_of_a_node(project):
    """A head that computes nothing, and one node after another."""
    port = "6397"
    common = ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block", f"--object-store-memory={10**8}"]
    head = project.start(
        sys.executable, "-c", RAY, "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", *common, **LOOPBACK
    )
    head.until(lambda: "Ray runtime started" in head.output)
    project.held.touch()
    hold = {**LOOPBACK, "STAND_IN_HOLDS": "prune"}
    node = project.start(sys.executable, "-c", RAY, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", *common, **hold)
    node.until(lambda: "Ray runtime started" in node.output)
    points = file(project, "node", "[0.8]")
    arguments = [points, "--address", f"127.0.0.1:{port}", "--node-directory", str(project.root.parent / "node")]
    sweep = project.sweep(*arguments, **LOOPBACK)
    sweep.until(lambda: project.executing("prune"))
    os.killpg(node.process.pid, signal.SIGKILL)
    project.start(sys.executable, "-c", RAY, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", *common, **hold)
    project.held.unlink()
    code, output = sweep.finished()
    assert code == 0, output
    (name,) = {name for name in project.experiments() if name.startswith("node-")}
    assert name in project.experiments("ls-remote", "origin")
    assert list((project.root.parent / "remote/runs").iterdir())
    head_commit = project.git("rev-parse", "HEAD").strip()
    project.git("update-ref", "-d", f"refs/exps/{head_commit[:2]}/{head_commit[2:]}/{name}")
    code, output = project.sweep(*arguments, **LOOPBACK).finished()
    assert code == 0, output
    assert "1 there already, 0 to run" in output


# What is declared, on clusters that are made up.


class _Ray:
    """A cluster with these nodes."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.resources = nodes

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": sum(node.get("GPU", 0) for node in self.resources)}


def _plan(device: str, processes: int = 1) -> Plan:
    params = {"prune": {"device": device, "processes": processes}, "evaluation": {"device": device}}
    point = Point(index=0, name="a", overrides=(), varied=(), params=params)
    return Plan(sweep=None, points=(point,), results={}, after={"a": frozenset()}, seconds={})


@pytest.mark.parametrize(
    ("nodes", "device", "declared", "gpus"),
    [
        ([{"GPU": 4}], "auto", None, 1),
        ([{"GPU": 4}], "cpu", None, 0),
        ([{"CPU": 4}], "auto", None, 0),
        ([{"GPU": 4}], "auto", 2, 2),
    ],
)
def test_a_point_has_one_gpu_where_the_cluster_has_any_and_it_would_use_it(nodes, device, declared, gpus):
    assert cluster.gpus_of_each(_Ray(*nodes), _plan(device), Resources(gpus=declared)) == gpus


def test_a_point_of_several_processes_has_a_gpu_for_each():
    assert cluster.gpus_of_each(_Ray({"GPU": 4}), _plan("auto", processes=4), Resources()) == 4


def test_a_point_that_no_single_node_can_take_is_refused():
    ray = _Ray({"CPU": 2, "memory": 2**30}, {"CPU": 8, "GPU": 1, "memory": 2**32})
    cluster._require_fits(ray, Resources(cpus=8, memory_gib=4), 1)
    message = r"found 2 CPUs, 2 GPUs, 4 GiB, wanted what one node has: 2 CPUs, 0 GPUs, 1.0 GiB; 8 CPUs, 1 GPUs, 4.0 GiB"
    with pytest.raises(ConfigError, match=message):
        cluster._require_fits(ray, Resources(cpus=2, memory_gib=4), 2)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"found no package ray, wanted it for --ray and --address: pip install .*\[ray\]"):
        cluster.client(None)
