"""Two processes, each with half of the windows, prune as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from benchmarks.memory import write_windows
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import composed
from stages.config.params import CONF
from stages.errors import ConfigError
from stages.files import BASE, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE, read_json
from stages.pruning import distributed
from stages.pruning.learning import balance
from stages.pruning.reconstruction import BETAS
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import project as projects
from tests import tiny
from tests.pruning import reconstruct_alone
from tests.pruning.test_architectures import fetched
from tests.pruning.test_distillation import literal

ENVIRONMENT = {**projects.ENVIRONMENT, "PYTHONPATH": str(CONF.parent)}
ONE = ["python", "-m"]
TWO = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "python", "-m"]


def finish(command: list[str], directory: Path) -> None:
    """Run a command to its end, which must be a good one."""
    quick = [str(projects.commands() / word) if word == "python" else word for word in command]
    done = subprocess.run(quick, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run(processes: list[str], directory: Path) -> dict[str, torch.Tensor]:
    """The masks that the prune stage leaves, run by one or two processes: tensor -> bool."""
    finish([*processes, "stages.prune"], directory)
    base = Checkpoint(directory / BASE)
    delta = SparseDelta(directory / SPARSE, base.fingerprint)
    return {name: delta.change(name, base.tensor).mask for name in delta}


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="prune.device: found 'cuda:0' for 2 processes, wanted cuda or auto"):
        distributed.local_device(torch.device("cuda:0"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with pytest.raises(ConfigError, match=r"prune.processes: found 1000, wanted at most the \d+ GPUs of this machine"):
        distributed.local_device(torch.device("cuda"))


def test_a_process_becomes_several_that_share_its_threads(monkeypatch):
    became = []
    monkeypatch.setattr(os, "execve", lambda *arguments: became.append(arguments))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distributed.become("stages.prune", ["method=wanda"], 4)
    (program, command, environment) = became[0]
    assert program == command[0] == sys.executable
    assert command[-4:] == ["--nproc-per-node=4", "-m", "stages.prune", "method=wanda"]
    assert environment["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    distributed.become("stages.prune", [], 4)
    assert became[1][2]["OMP_NUM_THREADS"] == "7"


def test_a_tensor_that_is_not_contiguous_is_not_broadcast():
    with pytest.raises(ValueError, match=r"found a tensor of strides \(1, 3\) for shape \[3, 2\], wanted a contiguous one"):
        distributed.broadcast(torch.zeros(2, 3).T, 0)


@pytest.mark.parametrize(
    ("kind", "method", "allocation", "error_tokens", "order"),
    [
        ("gpt2", "sparsegpt", "loss", 10, "exact"),
        ("mixtral", "wanda", "uniform", 10, "exact"),
        ("mixtral", "wanda", "uniform", 1, "exact"),  # of which the second process has none
        ("mixtral", "wanda_variant", "owl", 10, "exact"),
        ("gpt2", "dsnot", "alphapruning", 10, "exact"),
        ("mixtral", "wanda", "uniform", 10, "sequential"),
    ],
)
def test_two_processes_give_the_masks_of_one_but_for_one_bit_in_two_hundred(kind, method, allocation, error_tokens, order, tmp_path):
    """Sums are added up in another order; see the same bound for micro-batches in test_block_loop."""
    base = fetched(kind, tmp_path)
    (tmp_path / BASE).parent.mkdir()
    base.directory.rename(tmp_path / BASE)
    write_windows(tmp_path, torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0)))
    how = ["prune.micro_batch=1", "prune.expert_tokens=45", f"prune.error_tokens={error_tokens}"]
    params = composed(f"method={method}", f"allocation={allocation}", f"prune={order}", *how)
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(params))

    one = run(ONE, tmp_path)
    tokens = [(row["matrix"], row["tokens"], row["calibrated_on"]) for row in read_json(tmp_path / PRUNE_RESULTS / "sparsity.json")]
    two = run(TWO, tmp_path)
    assert one.keys() == two.keys()
    bits = sum(mask.numel() for mask in one.values())
    assert sum(int(mask.sum()) for mask in one.values()) == sum(int(mask.sum()) for mask in two.values())
    assert sum(int((one[name] != two[name]).sum()) for name in one) <= bits / 200
    assert all(torch.equal(one[name].sum(dim=-1), two[name].sum(dim=-1)) for name in one if method == "wanda")
    rows = read_json(tmp_path / PRUNE_RESULTS / "sparsity.json")
    assert [(row["matrix"], row["tokens"], row["calibrated_on"]) for row in rows] == tokens
    assert read_json(tmp_path / PRUNE_RESULTS / "provenance.json")["processes"] == 2
    assert not (tmp_path / PRUNE_JOURNAL).exists()


def lost_on(hidden: torch.Tensor, call, target: torch.Tensor, block) -> torch.Tensor:
    """The loss of a window by the formula."""
    lost = (run_block(block, hidden, call) - target).square().sum(dim=-1)
    return (lost / torch.maximum(hidden.square().mean(dim=-1), target.square().mean(dim=-1))).mean()


def test_two_processes_train_on_a_window_of_each_a_step(base, tmp_path):
    """As one process that averages the gradients of both windows."""
    windows = torch.randint(3, 400, (9, 24), generator=torch.Generator().manual_seed(0))  # the last three are held out
    save_file({"windows": windows}, tmp_path / "windows.safetensors")
    paths = [str(base.directory), str(tmp_path / "windows.safetensors"), str(tmp_path)]
    finish([*TWO, reconstruct_alone.__name__, *paths], tmp_path)
    files = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    found = [file["values"] for file in files]
    assert torch.equal(*found)
    assert torch.equal(*[file["losses"] for file in files])
    assert torch.equal(*[file["tried"] for file in files])  # a search decides alike everywhere
    assert len(files[0]["tried"]) > 1

    decoder, how = Decoder(base, torch.float32, torch.device("cpu")), reconstruct_alone.HOW
    with decoder.before_blocks():
        stream = Stream(decoder, windows, batch=1)
    with decoder.loaded(0, decoder.read(0)) as block:
        calls = [stream.window(0, window) for window in range(9)]
        with torch.no_grad():
            targets = [run_block(block, hidden, call) for hidden, call in calls]
        weight = block.get_parameter(reconstruct_alone.NAME).requires_grad_()
        mask, scale = torch.arange(weight.numel()).view(weight.shape) % 3 > 0, torch.mul(*balance(weight.detach()))
        weight.data.mul_(mask)

        def held_out() -> float:
            with torch.no_grad():
                return sum(lost_on(*calls[window], targets[window], block).item() for window in (6, 7, 8)) / 3

        losses, balanced = [held_out()], weight.detach() / scale
        optimiser = torch.optim.Adam([balanced], betas=BETAS)
        generator = torch.Generator().manual_seed(0)
        order = [window for _ in range(how.epochs) for window in torch.randperm(3, generator=generator).tolist()]
        for step, window in enumerate(order):
            lost = sum(lost_on(*calls[both], targets[both], block) for both in (window, 3 + window))
            balanced.grad = torch.autograd.grad(lost / 2, weight)[0] * mask * scale
            optimiser.param_groups[0]["lr"] = how.learning_rate * (1 - step / len(order))
            optimiser.step()
            weight.data.copy_(balanced * scale)
        losses.append(held_out())
        assert losses[1] < losses[0]
        assert files[0]["losses"].tolist() == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(found[0], weight.detach(), rtol=1e-3, atol=1e-5)


def test_two_processes_distil_by_the_mean_gradient_of_a_window_of_each(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", dtype=torch.float32)
    (tmp_path / BASE).mkdir(parents=True)
    local = LocalBase(source="local", path=str(source), name="tests/exact", fingerprint=None, license="mit")
    checkpoints.fetch(local, tmp_path / BASE, downloads=tmp_path / "unused")
    windows = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    write_windows(tmp_path, windows)
    distilled = ["reconstruction=distilled", "reconstruction.share=0.67", "reconstruction.block_epochs=0", "reconstruction.epochs=2"]
    params = composed("method=magnitude", "allocation.name=uniform", "prune.micro_batch=1", *distilled)
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(params))
    run(TWO, tmp_path)

    base = Checkpoint(tmp_path / BASE)
    delta = SparseDelta(tmp_path / SPARSE, base.fingerprint)
    changes = {name: delta.change(name, base.tensor) for name in delta}
    blocks = [{name: change for name, change in changes.items() if f".layers.{index}." in name} for index in range(3)]
    generator = torch.Generator().manual_seed(0)
    order = [[window, 3 + window] for _ in range(2) for window in torch.randperm(3, generator=generator).tolist()]
    expected, divergences = literal(base, blocks, windows, order, rate=0.0025)
    assert read_json(tmp_path / PRUNE_RESULTS / "provenance.json")["divergences"] == pytest.approx(divergences, rel=1e-4)
    for name, values in expected.items():
        torch.testing.assert_close(changes[name].values, values, rtol=1e-3, atol=2e-5)
