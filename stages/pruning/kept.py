"""Kept statistics: what one pass of the calibration windows through the dense model leaves for all points of a sweep.

With dense propagation the inputs of a layer depend on neither sparsity nor pattern nor score, so that a further point only reads,
chooses and writes. A directory holds a safetensors file for each block, with the statistics, the sample and the sample of the windows
held out of every distinct input, and manifest.json, which states all that they depend on.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from stages import devices, record
from stages.checkpoint.reader import Checkpoint
from stages.errors import ConfigError, SparsesweepError
from stages.files import (
    BASE,
    KEPT_MANIFEST,
    STATISTICS,
    bytes_in,
    free_disk,
    parsed_json,
    read_json,
    replacing,
    require_free_disk,
    sha256,
    write_json,
)
from stages.pruning import distributed
from stages.pruning.inputs import CalibratedOn, Inputs
from stages.pruning.memory import memory_budget, observing_bytes
from stages.pruning.observer import collect, stride_of
from stages.pruning.section import Kept, Prune
from stages.pruning.statistics import AllReduce, Gram, Moments, NoStatistic, SquaredNorm, Statistic, no_reduction
from stages.pruning.windows import calibration_windows, micro_batch, stream_of
from stages.streaming.architecture import Layer
from stages.streaming.decoder import Decoder
from stages.streaming.stream import GPU_SHARE, Stream, read_ahead

log = logging.getLogger(__name__)

METADATA = "sparsesweep"
AGAIN = "run the observe stage again (python -m stages.observe)"
FIELDS: dict[type[Statistic], tuple[str, ...]] = {  # of each statistic after its `finish`: tensors and integers
    SquaredNorm: ("value", "windows"),
    Moments: ("sums", "tokens"),
    Gram: ("value", "tokens"),
}
KINDS: dict[Kept, tuple[type[Statistic], ...]] = {
    Kept.NONE: (),
    Kept.NORMS: (SquaredNorm, Moments),
    Kept.GRAM: (SquaredNorm, Moments, Gram),
}
# The code that they depend on, below stages/: no other code reruns the observe stage, and a test compares this with what it imports.
CODE = (
    "checkpoint/__init__.py",
    "checkpoint/layout.py",
    "checkpoint/model.py",
    "checkpoint/model_class.py",
    "checkpoint/reader.py",
    "observe.py",
    "pruning/__init__.py",
    "pruning/distributed.py",
    "pruning/experts.py",
    "pruning/inputs.py",
    "pruning/kept.py",
    "pruning/memory.py",
    "pruning/observer.py",
    "pruning/section.py",
    "pruning/statistics.py",
    "pruning/windows.py",
    "streaming/__init__.py",
    "streaming/architecture.py",
    "streaming/calls.py",
    "streaming/decoder.py",
    "streaming/host_memory.py",
    "streaming/mixture.py",
    "streaming/products.py",
    "streaming/reading.py",
    "streaming/routers.py",
    "streaming/scope.py",
    "streaming/stream.py",
    "streaming/tokens_alone.py",
)
LIBRARIES = ("torch", "transformers", "safetensors")


@torch.no_grad()
def observe_dense_model(prune: Prune) -> None:
    """Write artifacts/statistics, whole or not at all.

    Raises:
        ConfigError: several processes were started; or a block with all of its experts does not fit the memory.
        ArchitectureError: several blocks multiply by a matrix.
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
    decoder.require_matrices_of_one_block(f"prune.statistics = {prune.statistics}")
    batch = micro_batch(windows.shape[1], device, prune.micro_batch)
    facts = fingerprint(prune, base, calibration, batch=batch, device=device, dtype=dtype)
    needed = block_bytes(decoder, Kept(prune.statistics), prune.error_tokens, windows.shape, held_out.shape)
    message = "statistics of %d blocks (prune.statistics=%s) take at most %.2f GB of disk, of which %.2f GB are free"
    log.info("read %s (%s), %d windows of %d tokens, and %d held out", BASE, decoder.name, *windows.shape, len(held_out))
    log.info(message, len(needed), prune.statistics, sum(needed) / 1e9, free_disk(STATISTICS) / 1e9)
    require_free_disk(STATISTICS, sum(needed))
    budget = host_budget(decoder, needed, prune)
    with devices.gpu_memory("prune.micro_batch", batch), replacing(STATISTICS) as directory:
        stream = stream_of(decoder, windows, held_out, batch=batch, budget=budget, gpu_share=GPU_SHARE)
        observe_blocks(stream, prune, directory, facts)
        write_json(directory / KEPT_MANIFEST, facts)
    size = bytes_in(STATISTICS)
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
    count, kinds = len(stream.decoder.blocks), KINDS[Kept(prune.statistics)]
    with read_ahead(stream.decoder, range(count)) as blocks:
        for index, tensors in enumerate(tqdm(blocks, total=count, desc="observing", unit="block")):
            with stream.decoder.loaded(index, tensors) as block:
                inputs, held_out = collect(
                    stream,
                    index,
                    block,
                    partial(Together, kinds),
                    error_tokens=prune.error_tokens,
                    expert_tokens=prune.expert_tokens,
                    propagates=index < count - 1,
                )
            write_block(directory, index, inputs, held_out, facts)


class Together:
    """Several statistics of the same inputs, each as if it were alone.

    Args:
        kinds: of the statistics. columns, device: see Statistic.
    """

    def __init__(self, kinds: tuple[type[Statistic], ...], columns: int, device: torch.device) -> None:
        self.all = [kind(columns, device) for kind in kinds]

    def add(self, inputs: torch.Tensor) -> None:
        for statistic in self.all:
            statistic.add(inputs)

    def finish(self, all_reduce: AllReduce = no_reduction) -> None:
        for statistic in self.all:
            statistic.finish(all_reduce)

    def include(self, other: Self) -> None:
        for statistic, seen in zip(self.all, other.all, strict=True):
            statistic.include(seen)

    def reorder(self, order: torch.Tensor) -> None:
        for statistic in self.all:
            statistic.reorder(order)


def serves(kept: Kept, statistic: type[Statistic]) -> bool:
    """Whether what is kept has the statistic that a method needs."""
    return kept is not Kept.NONE and statistic in (NoStatistic, *KINDS[kept])


def fingerprint(
    prune: Prune, base: Checkpoint, calibration: str, *, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, str | int]:
    """All that kept statistics depend on; what is kept is read where these are the same.

    Args:
        calibration: SHA-256 of the windows. batch: windows per forward pass.
    """
    versions = record.versions()
    return {
        "statistics": str(prune.statistics),
        "base": base.fingerprint,
        "config": sha256(base.directory / "config.json"),
        "calibration": calibration,
        "error_tokens": prune.error_tokens,
        "expert_tokens": prune.expert_tokens,
        "micro_batch": batch,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "code": record.code_sha256(*CODE),
        **{library: versions[library] for library in LIBRARIES},
    }


def block_bytes(decoder: Decoder, kept: Kept, error_tokens: int, windows: Sequence[int], held_out: Sequence[int]) -> list[int]:
    """Upper bounds on the bytes of each block's tensors: as many as if no two layers read the same inputs, each a row for every token.

    Args:
        error_tokens: see Observer, whose `sampled` they are. windows, held_out: number of windows, and tokens of each.
    """
    sampled = sum(-(-number * length // stride_of(number, length, error_tokens)) for number, length in (windows, held_out))
    sampled_of_expert = 2 * max(1, error_tokens // 8)
    bounds = []
    for matrices in decoder.matrices:
        columns = {matrix.layer: matrix.shape[1] for matrix in matrices}
        samples = sum(
            width * decoder.dtype.itemsize * (sampled if layer.expert is None else sampled_of_expert) for layer, width in columns.items()
        )
        bounds.append(samples + sum(_statistic_bytes(kept, width) for width in columns.values()))
    return bounds


def _statistic_bytes(kept: Kept, columns: int) -> int:
    """Bytes of all statistics that are kept of an input."""
    together = Together(KINDS[kept], columns, torch.device("meta"))
    return sum(tensor.nbytes for statistic in together.all for tensor in _tensors(statistic).values())


def _tensors(statistic: Statistic) -> dict[str, torch.Tensor]:
    return {field: torch.as_tensor(getattr(statistic, field)) for field in FIELDS[type(statistic)]}


def write_block(directory: Path, index: int, inputs: list[Inputs[Together]], held_out: dict[Layer, torch.Tensor], facts: Any) -> None:
    """Write the file of a block.

    Args:
        inputs, held_out: see observer.collect. facts: the fingerprint.
    """
    tensors, described = dict[str, torch.Tensor](), []
    for number, distinct in enumerate(inputs):
        for statistic in distinct.statistic.all:
            for field, tensor in _tensors(statistic).items():
                tensors[f"{number}.{type(statistic).__name__}.{field}"] = tensor.cpu().contiguous()
        tensors[f"{number}.sample"] = torch.cat(distinct.sample).cpu()
        if distinct.layers[0] in held_out:
            tensors[f"{number}.held_out"] = held_out[distinct.layers[0]].cpu()
        layers = [[layer.name, layer.expert] for layer in distinct.layers]
        described.append({"layers": layers, "tokens": distinct.tokens, "calibrated_on": distinct.calibrated_on})
    metadata = {"inputs": described, "fingerprint": facts}
    save_file(tensors, _path(directory, index), metadata={METADATA: json.dumps(metadata)})  # safetensors writes several keys in any order


def _path(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


class KeptInputs:
    """The kept inputs of every layer of a model, read block by block.

    Args:
        decoder: of the model. statistic: the kind of which each input has one.
        facts: the fingerprint that they must have.

    Raises:
        SparsesweepError: there are none, or those there are have another fingerprint; names what differs.
    """

    def __init__(self, directory: Path, decoder: Decoder, statistic: type[Statistic], facts: dict[str, str | int]) -> None:
        self.directory, self.decoder, self.statistic, self.facts = directory, decoder, statistic, facts
        _require_same(directory / KEPT_MANIFEST, read_json(directory / KEPT_MANIFEST), facts)

    def of_block(self, index: int) -> tuple[list[Inputs], dict[Layer, torch.Tensor]]:
        """Every distinct input of a block's layers, with its statistic on the device, and samples of the windows held out.

        Returns:
            See observer.collect; of the layers that read an input, the first has a sample of the windows held out.

        Raises:
            SparsesweepError: the file is missing, damaged or of other statistics; names it.
        """
        path = _path(self.directory, index)
        layers = {(layer.name, layer.expert): layer for layer in self.decoder.layers(index)}
        inputs, held_out = list[Inputs](), dict[Layer, torch.Tensor]()
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = parsed_json(file.metadata()[METADATA]), set(file.keys())
                _require_same(path, metadata["fingerprint"], self.facts)
                for number, described in enumerate(metadata["inputs"]):
                    sample = self._tensor(file, f"{number}.sample")
                    read = [layers[name, expert] for name, expert in described["layers"]]
                    inputs.append(
                        Inputs(
                            layers=read,
                            statistic=self._statistic(file, number, sample.shape[1]),
                            sample=[sample],
                            tokens=described["tokens"],
                            calibrated_on=CalibratedOn(described["calibrated_on"]),
                        )
                    )
                    if (key := f"{number}.held_out") in names:
                        held_out[read[0]] = self._tensor(file, key)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise SparsesweepError(f"{path}: not found or damaged ({error!r}); {AGAIN}") from error
        return inputs, held_out

    def _statistic(self, file: Any, number: int, columns: int) -> Statistic:
        statistic = self.statistic(columns, self.decoder.device)
        for field in FIELDS.get(self.statistic, ()):
            tensor = self._tensor(file, f"{number}.{self.statistic.__name__}.{field}")
            setattr(statistic, field, int(tensor) if isinstance(getattr(statistic, field), int) else tensor)
        return statistic

    def _tensor(self, file: Any, name: str) -> torch.Tensor:
        """Copied from the mapped file to where torch aligns it: products of tensors that are aligned otherwise are rounded otherwise."""
        return file.get_tensor(name).to(self.decoder.device, copy=True)


def _require_same(path: Path, actual: Any, wanted: dict[str, str | int]) -> None:
    """Raise SparsesweepError, naming what differs, if kept statistics have another fingerprint than wanted."""
    actual = actual if isinstance(actual, dict) else {}
    differing = [key for key in wanted if actual.get(key) != wanted[key]]
    if differing:
        found = "; ".join(f"{key}: found {actual.get(key)}, wanted {wanted[key]}" for key in differing)
        raise SparsesweepError(f"{path}: these statistics were kept of something else ({found}); {AGAIN}")
