"""Reconstruct a block with this process's windows; started by test_distributed as one of several.

python -m tests.pruning.reconstruct_alone CHECKPOINT WINDOWS OUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.reader import Checkpoint
from stages.prune import local_share
from stages.pruning import distributed
from stages.pruning.reconstruction import Reconstruction, reconstruct
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

NAME = "mlp.up_proj.weight"
HOW = Reconstruction(epochs=2, learning_rate=1e-3)


@torch.no_grad()
def main(checkpoint: Path, windows: Path, out: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        decoder = Decoder(Checkpoint(checkpoint), torch.float32, torch.device("cpu"))
        every = load_file(windows)["windows"]
        share, first = local_share(every)
        with decoder.before_blocks():
            stream = Stream(decoder, share, batch=1, first_window=first, all_windows=len(every))
        with decoder.loaded(0, decoder.read(0)) as block:
            targets = torch.cat([run_block(block, hidden, call) for _, hidden, call in stream.parts(0)])
            weight = block.get_parameter(NAME)
            mask = torch.arange(weight.numel()).view(weight.shape) % 3 > 0
            weight.mul_(mask)
            values = weight.clone()
            reconstruct(stream, 0, block, {NAME: mask}, {NAME: values}, targets, HOW)
            save_file({"values": values}, out / f"{distributed.rank()}.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
