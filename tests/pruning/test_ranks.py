"""Two processes, each with half of the windows, prune as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.config import CONF
from stages.files import BASE, CALIBRATION, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE, read_json, write_json
from tests.pruning.test_architectures import fetched
from tests.test_config import composed

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}
ONE = [sys.executable, "-m", "stages.prune"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "stages.prune"]


def run(command: list[str], directory: Path) -> dict[str, torch.Tensor]:
    """The masks that a command leaves: tensor -> bool."""
    done = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    delta = SparseDelta(directory / SPARSE, Checkpoint(directory / BASE).fingerprint)
    return {name: delta.change(name).mask for name in delta}


@pytest.mark.parametrize(
    ("kind", "method", "allocation"),
    [
        ("gpt2", "sparsegpt", "loss"),
        ("mixtral", "wanda", "uniform"),
        ("mixtral", "wanda_variant", "owl"),
        ("gpt2", "dsnot", "alphapruning"),
    ],
)
def test_two_processes_give_the_masks_of_one_but_for_one_bit_in_two_hundred(kind, method, allocation, tmp_path):
    """Sums are added up in another order; see the same bound for micro-batches in test_block_loop."""
    base = fetched(kind, tmp_path)
    (tmp_path / BASE).parent.mkdir()
    base.directory.rename(tmp_path / BASE)
    (tmp_path / CALIBRATION).mkdir()
    windows = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, tmp_path / CALIBRATION / "windows.safetensors")
    write_json(tmp_path / CALIBRATION / "provenance.json", {"windows_sha256": "0"})
    params = composed(
        f"method={method}", f"allocation={allocation}", "prune.micro_batch=1", "prune.expert_tokens=45", "prune.error_tokens=10"
    )
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(params))

    one = run(ONE, tmp_path)
    tokens = [(row["matrix"], row["tokens"], row["calibrated_on"]) for row in read_json(tmp_path / PRUNE_RESULTS / "sparsity.json")]
    two = run(TWO, tmp_path)
    assert one.keys() == two.keys()
    bits = sum(mask.numel() for mask in one.values())
    assert sum(int((one[name] != two[name]).sum()) for name in one) <= bits / 200
    assert all(torch.equal(one[name].sum(dim=-1), two[name].sum(dim=-1)) for name in one if method == "wanda")
    rows = read_json(tmp_path / PRUNE_RESULTS / "sparsity.json")
    assert [(row["matrix"], row["tokens"], row["calibrated_on"]) for row in rows] == tokens
    assert read_json(tmp_path / PRUNE_RESULTS / "provenance.json")["processes"] == 2
    assert not (tmp_path / PRUNE_JOURNAL).exists()
