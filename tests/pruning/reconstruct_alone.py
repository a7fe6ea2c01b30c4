"""Reconstruct a block with this process's windows; started by test_distributed as one of several.

python -m tests.pruning.reconstruct_alone CHECKPOINT WINDOWS OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.reader import Checkpoint
from stages.pruning import distributed
from stages.pruning.entries import Pruned
from stages.pruning.reconstruction import BlockTraining, Reconstruction, reconstruct
from stages.pruning.windows import local_share
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

NAME = "mlp.up_proj.weight"
HOW = Reconstruction(epochs=2, learning_rate=0.02, search=False)
HELD_OUT = 3


@torch.no_grad()
def main(checkpoint: Path, windows: Path, out: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        decoder = Decoder(Checkpoint(checkpoint), torch.float32, torch.device("cpu"))
        every = load_file(windows)["windows"]
        fitted, held_out = every[:-HELD_OUT], every[-HELD_OUT:]
        share, first = local_share(fitted)
        own = held_out.tensor_split(distributed.world_size())[distributed.rank()]
        with decoder.before_blocks():
            windows_of_process = torch.cat([share, own])
            stream = Stream(decoder, windows_of_process, held_out=len(own), batch=1, first_window=first, all_windows=len(fitted))
        with decoder.loaded(0, decoder.read(0)) as block:
            targets = torch.cat([run_block(block, hidden, call) for _, hidden, call in stream.parts(0)])
            (matrix,) = (matrix for matrix in decoder.matrices[0] if matrix.parameter_slice.name == NAME)
            weight, training = matrix.of(block).clone(), BlockTraining(HOW, block, targets)
            mask = torch.arange(weight.numel()).view(weight.shape) % 3 > 0
            matrix.of(block).mul_(mask)
            training.add(matrix, weight, Pruned(mask=mask), [], torch.float32)
            outcome = reconstruct(stream, 0, training)
            values = training.values[NAME].clone()
            losses = torch.tensor([outcome.before, outcome.after], dtype=torch.float64)
            training.settings = replace(HOW, search=True)
            tried = torch.tensor(list(reconstruct(stream, 0, training).tried.items()))
            found = {"values": values, "losses": losses, "tried": tried}
            save_file(found, out / f"{distributed.rank()}.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
