"""base + delta as a GGUF file of one type of weights, and what of it was read back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, ReleaseError
from stages.quantisation.ggml import TYPES, QuantisationType, blocks_of, fitting_shape, ggml_base
from stages.release.llama_cpp.architectures import (
    Architecture,
    architecture_of,
    from_pairs,
    heads_in_pairs,
    rotary_factors,
    to_pairs,
    write_parameters,
)
from stages.release.llama_cpp.vocabulary import Vocabulary, vocabulary_of

SIXTEEN_BITS = ("F16", "BF16")
OUTSIDE = "Q8_0"  # what embeddings and the output head get where matrices have fewer bits
ROTARY = "rope_freqs.weight"
HEADS = ("lm_head.weight",)  # left out where it is the embedding
COMPUTED = ".rotary_emb.inv_freq"  # of old checkpoints: llama.cpp computes it, and refuses a file that has it
FILE_TYPES = {  # what a file's header says of its weights
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": gguf.LlamaFileType.MOSTLY_Q6_K,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q3_K": gguf.LlamaFileType.MOSTLY_Q3_K_S,
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a checkpoint in a GGUF file.

    tensor, name: in the checkpoint and in the file. type: of its weights; None: float32.
    heads: whose rows are reordered, see to_pairs; None: as they are. offset: added to all.
    """

    tensor: str
    name: str
    type: QuantisationType | None
    heads: int | None
    offset: float

    def laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values as the file has them, float32."""
        values = tensor.float() + self.offset
        return values if self.heads is None else to_pairs(values, self.heads)

    def original(self, values: np.ndarray) -> torch.Tensor:
        """The values as the checkpoint has them, float32."""
        tensor = torch.from_numpy(values.astype(np.float32)) - self.offset
        return tensor if self.heads is None else from_pairs(tensor, self.heads)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What was read back from a GGUF file.

    type: that was asked for. file: its name. bytes: its size. zeros, weights: of the matrices in scope. otherwise: matrices with another
    type, since their rows do not divide into blocks.
    """

    type: str
    file: str
    bytes: int
    zeros: int
    weights: int
    otherwise: int


class GgufWriter:
    """Writes base + delta as a GGUF file.

    Args:
        wanted: name of the type of the matrices in scope, one of FILE_TYPES.

    Attributes:
        wanted: as given. plan: how each tensor of the base is stored. size: of all of them, in bytes.

    Raises:
        ArchitectureError: llama.cpp has no such architecture, tokenizer, tensor or shape, as far as it is known here; names it. No tensor
            was read. ConfigError: see ggml_base.
    """

    def __init__(self, base: Checkpoint, delta: SparseDelta, wanted: str) -> None:
        self._base, self._delta, self.wanted = base, delta, wanted
        self._config = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
        self._architecture: Architecture = architecture_of(self._config)
        self._vocabulary: Vocabulary = vocabulary_of(base.directory, self._config.vocab_size)
        self._names = gguf.get_tensor_name_map(self._architecture.model, self._config.num_hidden_layers)
        tied = getattr(self._config, "tie_word_embeddings", False)
        self.plan = [self._stored(name) for name in base if not ((tied and name in HEADS) or name.endswith(COMPUTED))]
        if any(stored.type is not None and stored.type.native for stored in self.plan):
            ggml_base()
        self.size = sum(_bytes(base.shape(stored.tensor), stored.type) for stored in self.plan)

    def _stored(self, tensor: str) -> Stored:
        name = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            subject = f"{self._config.model_type} as GGUF"
            raise ArchitectureError(f"{subject}: found no name for {tensor} in llama.cpp; leave gguf out of publish.formats")
        heads = next((heads for end, heads in heads_in_pairs(self._architecture, self._config) if tensor.endswith(end)), None)
        offset = self._architecture.norm_offset if tensor.endswith("norm.weight") else 0.0
        return Stored(tensor=tensor, name=name, type=self._type(tensor), heads=heads, offset=offset)

    def _type(self, tensor: str) -> QuantisationType | None:
        shape = self._base.shape(tensor)
        if len(shape) < 2 or self.wanted == "F32":
            return None
        outside = tensor not in self._delta and self.wanted not in SIXTEEN_BITS
        return fitting_shape(tensor, shape, TYPES[OUTSIDE if outside else self.wanted])

    def write(self, path: Path) -> None:
        """Write the file, with one tensor in memory at a time.

        Raises:
            ReleaseError: float16 cannot represent a weight or a scale; names the tensor.
        """
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self._architecture.model])
        writer.add_type("model")
        writer.add_name(path.stem)
        writer.add_file_type(FILE_TYPES[self.wanted])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_parameters(writer, self._config)
        self._vocabulary.write(writer, self._base.directory)
        factors = rotary_factors(self._config)
        if factors is not None:
            writer.add_tensor_info(ROTARY, factors.shape, np.dtype(np.float32), 4 * factors.numel())
        for stored in self.plan:
            shape = self._base.shape(stored.tensor)
            writer.add_tensor_info(stored.name, shape, np.dtype(np.float32), _bytes(shape, stored.type), _code(stored.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for stored in tqdm(self.plan, desc=f"writing GGUF, {self.wanted}", unit="tensor"):
            writer.write_tensor_data(self._blocks(stored))
        writer.close()

    def _blocks(self, stored: Stored) -> np.ndarray:
        tensor = self._base.tensor(stored.tensor)
        values = stored.laid_out(self._delta.apply(stored.tensor, tensor)).contiguous()
        if stored.type is None:
            return values.numpy()
        try:
            return blocks_of(values, stored.type)
        except ValueError as error:
            raise ReleaseError(f"{stored.tensor}: {error}; leave {stored.type.name} out of publish.gguf_types") from error

    def write_checked(self, path: Path) -> Counted:
        """Write the file, read it back and count; raises as `write` and `check` do."""
        self.write(path)
        return self.check(path)

    def check(self, path: Path) -> Counted:
        """Read a written file back and count zeros in it, matrix by matrix, against the masks.

        Raises:
            ReleaseError: a tensor is missing or has another type or shape, or a pruned weight is not zero; names it.
        """
        there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        if missing := {stored.name for stored in self.plan} - set(there):
            raise ReleaseError(f"{path.name}: found no tensor {min(missing)}")
        in_scope = [stored for stored in self.plan if stored.tensor in self._delta]
        zeros = weights = 0
        for stored in tqdm(in_scope, desc="checking GGUF", unit="tensor"):
            zero = _read(path, there[stored.name], stored, self._base.shape(stored.tensor)) == 0
            pruned = ~self._delta.change(stored.tensor, self._base.tensor).mask
            if (pruned & ~zero).any():
                found = f"found {int((pruned & ~zero).sum())} pruned weights that are not zero, wanted none"
                raise ReleaseError(f"{path.name}, {stored.name}: {found}")
            zeros, weights = zeros + int(zero.sum()), weights + zero.numel()
        otherwise = sum(stored.type is not TYPES.get(self.wanted) for stored in in_scope)
        size = path.stat().st_size
        return Counted(type=self.wanted, file=path.name, bytes=size, zeros=zeros, weights=weights, otherwise=otherwise)


def write_checked(writers: list[GgufWriter], directory: Path, name: str) -> list[Counted]:
    """Write a file of each writer, NAME-TYPE.gguf, and read it back; see GgufWriter.

    Args:
        name: of the release, with or without ORG/.
    """
    return [writer.write_checked(directory / f"{name.rsplit('/', 1)[-1]}-{writer.wanted}.gguf") for writer in writers]


def _read(path: Path, tensor: Any, stored: Stored, shape: tuple[int, ...]) -> torch.Tensor:
    """Dequantise a tensor of a GGUF file into the checkpoint's layout."""
    code = _code(stored.type)
    found = (tensor.tensor_type, tuple(int(length) for length in reversed(tensor.shape)))
    if found != (code, shape):
        raise ReleaseError(f"{path.name}, {stored.name}: found {found[0].name} of {list(found[1])}, wanted {code.name} of {list(shape)}")
    return stored.original(gguf.dequantize(tensor.data, code))


def _code(of: QuantisationType | None) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32 if of is None else of.code


def _bytes(shape: tuple[int, ...], of: QuantisationType | None) -> int:
    weights = torch.Size(shape).numel()
    return 4 * weights if of is None else weights // of.block * of.block_bytes
