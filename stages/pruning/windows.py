"""The calibration windows: those that the sample stage drew, and their way through the decoder in one process."""

import torch
from safetensors.torch import load_file

from stages.checkpoint.reader import Checkpoint
from stages.errors import CalibrationError, ConfigError
from stages.files import BASE, CALIBRATION, PRUNE_JOURNAL, read_json, sha256
from stages.pruning import distributed
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}


def calibration_windows(base: Checkpoint) -> tuple[torch.Tensor, torch.Tensor, str]:
    """What the sample stage drew: windows to calibrate on and windows held out, [windows, tokens] each, int64, and the file's SHA-256.

    Raises:
        CalibrationError: the windows are not there, not those that were drawn, or drawn with another tokenizer.json than this base's.
    """
    path, facts = CALIBRATION / "windows.safetensors", read_json(CALIBRATION / "provenance.json")
    missing = [key for key in ("windows_sha256", "tokenizer_sha256") if key not in facts]
    if missing:
        raise CalibrationError(f"{CALIBRATION}/provenance.json: found no {' and no '.join(missing)}; run the sample stage again")
    actual = sha256(path) if path.is_file() else "no file"
    if actual != facts["windows_sha256"]:
        raise CalibrationError(f"{path}: found {actual}, wanted SHA-256 {facts['windows_sha256']}; run the sample stage again")
    tokenizer = facts["tokenizer_sha256"]
    if tokenizer != base.tokenizer_sha256:
        raise CalibrationError(
            f"{CALIBRATION}: found windows of the tokenizer with SHA-256 {tokenizer}, wanted that of {BASE}, {base.tokenizer_sha256}; "
            "run the sample stage again"
        )
    tensors = load_file(path)
    if "held_out" not in tensors:
        raise CalibrationError(f"{path}: found no tensor held_out; run the sample stage again")
    return tensors["windows"], tensors["held_out"], actual


def windows_of_sources() -> tuple[int, ...]:
    """How many of the windows to calibrate on each source has, in their order."""
    sources = read_json(CALIBRATION / "provenance.json").get("sources", {})
    return tuple(len(source["windows"]) for source in sources.values())


def micro_batch(tokens: int, device: torch.device, asked: int | None) -> int:
    """Windows per forward pass.

    Args:
        tokens: of a window. asked: windows, or None for a number that depends on the kind of device alone, so that the same kind
            always computes the same.
    """
    return asked or max(1, TOKENS_PER_PASS[device.type] // tokens)


def stream_of(
    decoder: Decoder,
    windows: torch.Tensor,
    held_out: torch.Tensor | None = None,
    *,
    batch: int,
    budget: int,
    gpu_share: float,
    streams: int = 1,
) -> Stream:
    """This process's share of some windows, and of windows held out, before the first block.

    Args:
        streams: of so many at the same time each has its part of the budget and of the GPU's memory.
    """
    local_windows, first = local_share(windows)
    local_held_out = windows[:0] if held_out is None else held_out.tensor_split(distributed.world_size())[distributed.rank()]
    memory = HostMemory(budget // streams, PRUNE_JOURNAL.parent)
    with decoder.before_blocks():
        return Stream(
            decoder,
            torch.cat([local_windows, local_held_out]),
            held_out=len(local_held_out),
            batch=batch,
            memory=memory,
            gpu_share=gpu_share / streams,
            first_window=first,
            all_windows=len(windows),
        )


def local_share(windows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's windows, [its windows, tokens], and the number of its first.

    Raises:
        ConfigError: there are fewer windows than processes.
    """
    if len(windows) < distributed.world_size():
        raise ConfigError(
            f"calibration.windows: found {len(windows)}, wanted at least one for each of {distributed.world_size()} processes"
        )
    shares = windows.tensor_split(distributed.world_size())
    return shares[distributed.rank()], sum(map(len, shares[: distributed.rank()]))
