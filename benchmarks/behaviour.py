"""What every cell of the leaderboard makes of a small random model: tells a change of what is pruned from a mere rewrite.

python -m benchmarks.behaviour

Takes a minute or two and writes benchmarks/behaviour.json, in which figures that are still the same stay as they are. The tests
hold the code to that file. benchmarks.quality keeps with each point the figures that its code had, and calls it stale where the
file now has others.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from benchmarks import arguments
from benchmarks.contenders import SMOLLM2, Point, points
from benchmarks.memory import write_windows
from stages import prune
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.files import BASE, CALIBRATION, PRUNE_RESULTS, SPARSE, read_json, write_json

FILE = Path("benchmarks/behaviour.json")
TOLERANCES = {"error": 0.01, "left": 0.01, "output": 0.02, "revision": 0.0}  # relative; rounding alone moves them by half of that
PROCESSORS = {"error": 0.03, "left": 0.01, "output": 0.05, "revision": 0.0}  # likewise; by other kinds of processors they moved by 0.034
REVISIONS = {  # raised by hand where a part of a cell's overrides prunes real models otherwise, which the small one does not show
    "allocation=loss": 1,  # how much gradients weigh tokens is judged
    "reconstruction=": 2,  # blocks search for the rate
    "method=swaps": 1,  # swaps and refits are judged on windows held out, and so are the allocations below
    "allocation=owl": 1,
    "allocation=alphapruning": 1,
}
WINDOWS, LENGTH, VOCABULARY = 32, 64, 96

Figures = dict[str, float]


def main() -> None:
    kept, found = load(), {}
    with project():
        for point in cells():
            figures = measured(point)
            changed = not as_written(figures, point.cell)
            found[point.cell] = figures if changed else kept[point.cell]
            print("changed  " if changed else "as it was", point.cell, figures, flush=True)
    write_json(FILE, found)


@cache
def load() -> dict[str, Figures]:
    """Of every cell, as they were written last."""
    return read_json(FILE) if FILE.is_file() else {}


def cells() -> list[Point]:
    """A point of every cell."""
    return [point for point in points(SMOLLM2) if point.seed == 0]


def same(figures: Figures, others: Figures | None, tolerances: Figures = TOLERANCES) -> bool:
    """Whether they differ by rounding at most; a figure that is missing is 0."""
    if others is None:
        return False
    names = figures.keys() | others.keys()
    return all(math.isclose(figures.get(name, 0.0), others.get(name, 0.0), rel_tol=tolerances[name]) for name in names)


def as_written(figures: Figures, cell: str) -> bool:
    """Whether figures that were measured now are those of the file, which may be of another kind of processor."""
    return same(figures, load().get(cell), PROCESSORS)


@contextmanager
def project() -> Iterator[None]:
    """Work where the fetch and sample stages have left a random model and random windows, in one thread, for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory, chdir(directory):
            write_model()
            write_rest(torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0)))
            yield
    finally:
        torch.set_num_threads(threads)


def write_model() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.05,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn_like(parameter).div(2).exp()  # some channels are louder than others
    model.to(torch.bfloat16).save_pretrained(BASE, max_shard_size="300KB")


def write_rest(windows: torch.Tensor) -> None:
    """What the fetch and sample stages leave besides a model. windows: [windows, tokens], int64."""
    write_json(BASE / "provenance.json", {"name": "random", "files": {"model.safetensors": "generator 0"}})
    write_windows(Path(), windows)


def measured(point: Point) -> Figures:
    """Prune in a project.

    Returns:
        error: the mean relative error of the matrices, as the prune stage reports it.
        left: the Euclidean norm of what was pruned, all together, over what it was.
        output: the distance of the pruned model's logits on the calibration windows to the dense model's, over these.
        revision: that of the cell's parts, see REVISIONS; missing where it is 0.
    """
    sections = read(*point.arguments, "prune.device=cpu", "prune.dtype=float32")
    run_prune(sections)
    base, windows = Checkpoint(BASE), load_file(CALIBRATION / "windows.safetensors")["windows"]
    delta = SparseDelta(SPARSE, base.fingerprint)
    dense, pruned = (load_model(base, apply, dtype=torch.float32, device=torch.device("cpu")) for apply in (None, delta.apply))
    with torch.no_grad():
        expected, found = (model(windows).logits for model in (dense, pruned))
    figures = {
        "error": read_json(PRUNE_RESULTS / "metrics.json")["relative_error"],
        "left": norm([pruned.get_parameter(name) for name in delta]) / norm([dense.get_parameter(name) for name in delta]),
        "output": float((found - expected).norm() / expected.norm()),
    }
    revision = sum(number for override, number in REVISIONS.items() if override in point.overrides)
    return {name: float(f"{value:.6g}") for name, value in figures.items()} | ({"revision": revision} if revision else {})


def run_prune(sections: dict[str, Any]) -> None:
    """The prune stage, in the current directory. sections: all that are composed, by name."""
    prune.main.function(**{name: sections[name] for name in prune.main.parameters[""] if name in sections})


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
