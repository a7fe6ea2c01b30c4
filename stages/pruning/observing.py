"""One pass of the calibration windows through the dense model, of which statistics are kept; see kept."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from stages import devices, record
from stages.checkpoint.reader import Checkpoint
from stages.errors import ConfigError
from stages.files import BASE, STATISTICS, free_disk, replacing, require_free_disk
from stages.pruning import distributed, kept
from stages.pruning.memory import memory_budget, observing_bytes
from stages.pruning.observer import collect
from stages.pruning.section import Kept, Prune
from stages.pruning.windows import calibration_windows, micro_batch, stream_of
from stages.streaming.decoder import Decoder
from stages.streaming.stream import GPU_SHARE, Stream, read_ahead

log = logging.getLogger(__name__)


@torch.no_grad()
def observe_dense_model(prune: Prune) -> None:
    """Write artifacts/statistics, whole or not at all.

    Raises:
        ConfigError: several processes were started; or a block with all of its experts does not fit the memory.
        SparsesweepError: the disk does not hold what is to be kept. All of these before a weight is read.
        PruningError: activations are not finite; names the block.
    """
    stopwatch = record.Stopwatch()
    replace(prune, processes=distributed.started_processes()).check("prune")
    device = devices.choose_device("prune.device", prune.device)
    dtype = devices.choose_dtype(prune.dtype, device)
    base = Checkpoint(BASE)
    windows, held_out, calibration = calibration_windows(base)
    decoder = Decoder(base, dtype, device)
    batch = micro_batch(windows.shape[1], device, prune.micro_batch)
    facts = kept.fingerprint(prune, base, calibration, batch=batch, device=device, dtype=dtype)
    needed = kept.block_bytes(decoder, Kept(prune.statistics), prune.error_tokens, windows.numel(), held_out.numel())
    message = "statistics of %d blocks (prune.statistics=%s) take at most %.2f GB of disk, of which %.2f GB are free"
    log.info(message, len(needed), prune.statistics, sum(needed) / 1e9, free_disk(STATISTICS) / 1e9)
    require_free_disk(STATISTICS, sum(needed))
    budget = host_budget(decoder, needed, prune)
    with devices.gpu_memory("prune.micro_batch", batch), replacing(STATISTICS) as directory:
        stream = stream_of(decoder, windows, held_out, batch=batch, budget=budget, gpu_share=GPU_SHARE)
        observe_blocks(stream, prune, directory, facts)
        kept.write_manifest(directory, facts)
    size = sum(path.stat().st_size for path in STATISTICS.iterdir())
    log.info("wrote %s: %.2f GB, %.0f s", STATISTICS, size / 1e9, stopwatch.seconds)


def host_budget(decoder: Decoder, kept_bytes: list[int], prune: Prune) -> int:
    """Bytes of host memory for the hidden states.

    Args:
        kept_bytes: of each block.

    Raises:
        ConfigError: a block with all of its experts does not fit, so that prune would load them one at a time.
    """
    needed, available = observing_bytes(decoder, kept_bytes), memory_budget(prune.memory_budget)
    if needed > available and decoder.has_experts and decoder.take_experts_apart():
        sizes = f"need up to {needed / 1e9:.1f} GB of host memory, of which {available / 1e9:.1f} GB are there"
        wanted = f"none: blocks with all of their experts {sizes}, and of experts that are loaded one at a time nothing is kept"
        raise ConfigError(f"prune.statistics: found {prune.statistics!r}, wanted {wanted}")
    return max(0, available - needed)


def observe_blocks(stream: Stream, prune: Prune, directory: Path, facts: dict[str, str | int]) -> None:
    """Run the windows through block after block, and write a file for each."""
    count, kinds = len(stream.decoder.blocks), kept.STATISTICS[Kept(prune.statistics)]
    with read_ahead(stream.decoder, range(count)) as blocks:
        for index, tensors in enumerate(tqdm(blocks, total=count, desc="observing", unit="block")):
            with stream.decoder.loaded(index, tensors) as block:
                inputs, held_out = collect(
                    stream,
                    index,
                    block,
                    partial(kept.Together, kinds),
                    error_tokens=prune.error_tokens,
                    expert_tokens=prune.expert_tokens,
                    propagates=index < count - 1,
                )
            kept.write_block(directory, index, inputs, held_out, facts)
