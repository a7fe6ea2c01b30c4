"""The learning rates of block training: absolute, and in balanced coordinates, on the first blocks of a model.

python -m benchmarks.rates

Takes a project's base and calibration windows (`dvc repro sample`). Wanda prunes each block to 50%; every setting trains it from the same
start; the best goes on to the next block. Writes what each left of the error on the windows held out, as a fraction of the error before
the training, into benchmarks/rates.json. Where the search of conf/reconstruction begins was chosen on it: no evaluation text is read.
"""

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import method
from stages.files import BASE, read_json, write_json
from stages.pruning import block_loop, learning, reconstruction
from stages.pruning.block_loop import prune_blocks
from stages.pruning.learning import Outcome, Scales
from stages.pruning.patterns import Unstructured
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import BlockTraining, Reconstruction
from stages.pruning.section import Propagation
from stages.pruning.windows import calibration_windows
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

FILE = Path("benchmarks/rates.json")
BLOCKS = 6
SETTINGS = [("absolute", 0.0015), ("absolute", 0.00015), *(("balanced", rate) for rate in (0.0025, 0.005, 0.01, 0.02, 0.04))]


def unscaled(weight: torch.Tensor) -> Scales:
    """Scales that leave the weights as they are."""
    return weight.new_ones(len(weight), 1), weight.new_ones(1, weight.shape[1])


def main() -> None:
    base = Checkpoint(BASE)
    windows, held_out, _ = calibration_windows(base)
    decoder = Decoder(base, torch.float32, torch.device("cpu"))
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(
        method=method("wanda"),
        patterns=dict.fromkeys(names, Unstructured(sparsity=0.5, comparison_group="row")),
        propagate=Propagation.PRUNED,
        error_tokens=256,
        expert_tokens=256,
        reconstruction=Reconstruction(epochs=1, learning_rate=1.0, search=False),
    )
    with decoder.before_blocks():
        stream = Stream(decoder, torch.cat([windows, held_out]), batch=2, held_out=len(held_out))
    rows: list[dict[str, float]] = []
    learning.ATTEMPTS = 1  # every rate as it is
    block_loop.reconstruct = lambda stream, index, training, _: tried(stream, index, training, rows)
    for block in prune_blocks(stream, plan):
        if block.index == BLOCKS - 1:
            break
    known: dict[str, Any] = read_json(FILE) if FILE.is_file() else {}
    name = read_json(BASE / "provenance.json")["name"]
    write_json(FILE, {**known, name: {"mean": {key: mean([row[key] for row in rows]) for key in rows[0]}, "blocks": rows}})


def tried(stream: Stream, index: int, training: BlockTraining, rows: list[dict[str, float]]) -> Outcome:
    """Train a block by every setting; take the best."""
    balanced = dict(training.balance.scales)
    start = {name: values.clone() for name, values in training.values.items()}
    best = math.inf, start, Outcome(before=math.inf, tried={})
    row = {}
    for coordinates, rate in SETTINGS:
        for name, values in start.items():
            training.values[name].copy_(values)
        training.write(start)
        absolute = {matrix.name: unscaled(view) for matrix, view in training.views(start)}
        training.balance.scales.update(balanced if coordinates == "balanced" else absolute)
        training.settings = Reconstruction(epochs=1, learning_rate=rate, search=False)
        outcome = reconstruction.reconstruct(stream, index, training)
        row[f"{coordinates} {rate:g}"] = round(min(outcome.tried.values()) / outcome.before, 4)
        if outcome.after < best[0]:
            best = outcome.after, {name: values.clone() for name, values in training.values.items()}, outcome
    print(index, row, flush=True)
    rows.append(row)
    for name, values in best[1].items():
        training.values[name].copy_(values)
    training.write(training.values)
    return best[2]


def mean(ratios: list[float]) -> float:
    """Geometric."""
    return round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 4)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
