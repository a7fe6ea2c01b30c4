"""The kernel of SparseGPT's sweep, run by triton's interpreter on the CPU, against the loop. Skipped where triton is not installed."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from stages.pruning.patterns import Nm, Pattern, Unstructured
from stages.pruning.scores.obs import obs
from stages.pruning.updates.sparsegpt import _Blocks
from tests.project import ROOT

INTERPRETED = "TRITON_INTERPRET"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch's builds for NVIDIA GPUs")
def test_the_kernel_gives_what_the_loop_gives():
    """In a process of its own: triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "addopts=", "-q", "-k", "interpreted", __file__]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, INTERPRETED: "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


@pytest.mark.skipif(INTERPRETED not in os.environ, reason="runs in the process that the test before starts")
@pytest.mark.parametrize("rows", [16, 37])
@pytest.mark.parametrize(
    ("columns", "pattern"),
    [
        (64, Unstructured(sparsity=0.5, comparison_group="matrix")),
        (48, Nm(kept=2, group=4)),
        (40, Nm(kept=5, group=8)),
    ],
)
def test_interpreted_it_sweeps_a_block(rows: int, columns: int, pattern: Pattern):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    gram = inputs.T @ inputs
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight = torch.randn(columns, rows, generator=generator)
    weight[:, 3] = 1.0  # scores that are equal but for the factor

    def blocks() -> _Blocks:
        nm = pattern if isinstance(pattern, Nm) else None
        empty = torch.empty_like(weight, dtype=torch.bool)
        decision = pattern.decision_columns(columns)
        return _Blocks(weight.clone(), empty, factor, lambda some, diagonal, first: pattern.mask(obs(some, diagonal), first), decision, nm)

    loop, kernel = blocks(), blocks()
    errors = loop.sweep_by_columns(0, columns)
    torch.testing.assert_close(kernel.sweep_by_kernel(0, columns), errors, rtol=1e-4, atol=1e-5)
    assert torch.equal(kernel.mask, loop.mask)
    torch.testing.assert_close(kernel.weight * kernel.mask, loop.weight * loop.mask, rtol=1e-4, atol=1e-5)
