"""Quantise and dequantise matrices with llama.cpp's types: what a user can do to a model instead of pruning it.

A row is cut into blocks of 32 or 256 weights, each of which stores scales in float16 and one code per weight, so that

    w ~ d q            Q8_0, Q6_K, Q5_0, Q4_0, Q3_K: 0 stays exactly 0
    w ~ d q - m        Q5_K, Q5_1, Q4_K, Q2_K: 0 becomes a value near 0, unless m = 0

where the K types divide a block of 256 into sub-blocks with quantised scales of their own. This is what `llama-quantize --pure` does:
no importance matrix, and none of the mixtures such as Q4_K_M, which give some matrices another type.
github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c.

The types of 32 weights a block and dequantisation come from the package gguf, quantisation to the K types from libggml-base, which the
package libggml-python brings, the extra `ruler`.
"""

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files

import gguf
import numpy as np
import torch

from stages.errors import ArchitectureError, ConfigError
from stages.streaming.architecture import Matrix
from stages.streaming.decoder import Decoder

PACKAGE = "libggml-python"
LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


@dataclass(frozen=True, kw_only=True)
class QuantisationType:
    """A type of llama.cpp.

    otherwise: name of the type that llama.cpp takes where rows do not divide into this type's blocks, as its function
        tensor_type_fallback has it; None: it stops.
    native: whether quantisation needs libggml-base.
    """

    name: str
    otherwise: str | None = None
    native: bool = False

    @property
    def block(self) -> int:
        """Weights per block."""
        return gguf.GGML_QUANT_SIZES[self.code][0]

    @property
    def block_bytes(self) -> int:
        return gguf.GGML_QUANT_SIZES[self.code][1]

    @property
    def bytes_per_weight(self) -> float:
        return self.block_bytes / self.block

    @property
    def code(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.name]

    def fits(self, columns: int) -> bool:
        """Whether a row of so many weights divides into blocks."""
        return columns % self.block == 0


TYPES = {
    of.name: of
    for of in (
        QuantisationType(name="F16"),
        QuantisationType(name="BF16"),
        QuantisationType(name="Q8_0"),
        QuantisationType(name="Q6_K", otherwise="Q8_0", native=True),
        QuantisationType(name="Q5_K", otherwise="Q5_1", native=True),
        QuantisationType(name="Q5_1"),
        QuantisationType(name="Q5_0"),
        QuantisationType(name="Q4_K", otherwise="Q5_0", native=True),
        QuantisationType(name="Q4_0"),
        QuantisationType(name="Q3_K", otherwise="Q4_0", native=True),
        QuantisationType(name="Q2_K", otherwise="Q4_0", native=True),
    )
}
LAST_RESORT = TYPES["F16"]  # where rows do not divide into blocks of the other type either


def type_named(name: str) -> QuantisationType:
    """Find a type by llama.cpp's name.

    Raises:
        ConfigError: there is no such type here.
    """
    if name not in TYPES:
        raise ConfigError(f"quantisation type: found {name!r}, wanted one of {', '.join(TYPES)}")
    return TYPES[name]


def quantised(weight: torch.Tensor, of: QuantisationType) -> torch.Tensor:
    """Quantise a matrix and dequantise it again.

    Args:
        weight: [rows, columns], finite floats; a block lies within a row.

    Returns:
        [rows, columns], dtype and device of `weight`; a dtype of fewer bits than float32 rounds the dequantised values once more.

    Raises:
        ValueError: the columns do not divide into blocks, or a value or scale is beyond float16.
        ConfigError: the type needs libggml-base, and its package is not installed.
    """
    _, dequantised = _quantised(weight, of)
    return torch.from_numpy(dequantised.astype(np.float32, copy=False)).to(weight.device, weight.dtype)


def blocks_of(weight: torch.Tensor, of: QuantisationType) -> np.ndarray:
    """Quantise a matrix, [rows, columns] -> [rows, ...]: the bytes of a row are those of a GGUF file. Raises as `quantised` does."""
    blocks, _ = _quantised(weight, of)
    return blocks


def _quantised(weight: torch.Tensor, of: QuantisationType) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of a matrix, and the values that they stand for."""
    if not of.fits(weight.shape[-1]):
        raise ValueError(f"{of.name}: found a matrix of shape {list(weight.shape)}, wanted columns in multiples of {of.block}")
    values = weight.detach().to("cpu", torch.float32).contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        blocks = _by_ggml(values, of) if of.native else gguf.quantize(values, of.code)
        dequantised = gguf.dequantize(blocks, of.code)
    if not np.isfinite(dequantised).all():
        raise ValueError(f"{of.name}: found weights up to {np.abs(values).max():.3g}, wanted weights whose scales float16 can represent")
    return blocks, dequantised


class Quantiser:
    """Quantises the matrices that pruning prunes: those of the decoder blocks, without routers; each row along the layer's inputs.

    The rest stays as it is, as pruning leaves it too: embeddings, output head, norms and biases.

    Args:
        matrices: those in scope, as Decoder.matrices has them.
        wanted: the type. A matrix whose rows do not divide into its blocks gets the type that llama.cpp takes instead.

    Attributes:
        types: name of the matrix -> type that it gets; known before any weight is read.

    Raises:
        ArchitectureError: llama.cpp has no other type for a matrix that does not fit; names the matrix.
        ConfigError: a type needs libggml-base, and its package is not installed.
    """

    def __init__(self, matrices: Iterable[Matrix], wanted: QuantisationType) -> None:
        self._matrices: dict[str, list[Matrix]] = defaultdict(list)
        self.types: dict[str, QuantisationType] = {}
        self._weights = self._bytes = 0
        for matrix in matrices:
            of = fitting(matrix, wanted)
            self._matrices[matrix.tensor].append(matrix)
            self.types[matrix.name] = of
            self._weights += matrix.size
            self._bytes += matrix.size // of.block * of.block_bytes
        if any(of.native for of in self.types.values()):
            ggml_base()

    @classmethod
    def for_decoder(cls, decoder: Decoder, name: str) -> "Quantiser":
        """Quantise all matrices in scope of a model to the type of this name, see type_named."""
        return cls((matrix for block in decoder.matrices for matrix in block), type_named(name))

    @property
    def bytes_per_weight(self) -> float:
        """The mean over all weights in scope, of the types that are used."""
        return self._bytes / self._weights

    @property
    def shares(self) -> dict[str, float]:
        """Name of a type -> the share of the weights in scope that get it, the largest first."""
        sizes: dict[str, int] = defaultdict(int)
        for matrix in (matrix for of_tensor in self._matrices.values() for matrix in of_tensor):
            sizes[self.types[matrix.name].name] += matrix.size
        return {name: sizes[name] / self._weights for name in sorted(sizes, key=lambda name: -sizes[name])}

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Quantise and dequantise a tensor of the checkpoint, an Apply of stages.checkpoint.model.

        Args:
            name: of the tensor in the checkpoint; outside the scope it comes back as it is.

        Returns:
            float32 where it is quantised: bfloat16 would round the values once more.

        Raises:
            ArchitectureError: a scale of a matrix is beyond float16; names the matrix.
        """
        if name not in self._matrices:
            return tensor
        result = tensor.to(torch.float32, copy=True)
        for matrix in self._matrices[name]:
            stored = matrix.stored_in(result)
            try:
                stored.copy_(quantised(stored, self.types[matrix.name]))
            except ValueError as error:
                raise ArchitectureError(f"{matrix.name}: {error}") from error
        return result


def fitting(matrix: Matrix, wanted: QuantisationType) -> QuantisationType:
    """The type that llama.cpp gives a matrix for which one is asked.

    Raises:
        ArchitectureError: the rows do not divide into blocks, and llama.cpp has no other type; names the matrix.
    """
    return fitting_shape(matrix.name, matrix.shape, wanted)


def fitting_shape(name: str, shape: Sequence[int], wanted: QuantisationType) -> QuantisationType:
    """The same of a matrix of this name and shape, [rows, columns]."""
    columns = shape[1]
    if wanted.fits(columns):
        return wanted
    if wanted.otherwise is None:
        found = f"found a matrix of shape {list(shape)}, wanted columns in multiples of {wanted.block}"
        raise ArchitectureError(f"{name}: {found} for {wanted.name}, for which llama.cpp has no other type")
    otherwise = TYPES[wanted.otherwise]
    return otherwise if otherwise.fits(columns) else LAST_RESORT


@cache
def ggml_base() -> ctypes.CDLL:
    """Load libggml-base of the package libggml-python.

    Raises:
        ConfigError: the package is not installed, or has no such library.
    """
    advice = "it quantises to the K types; pip install -c constraints.txt -e '.[ruler]' brings it"
    try:
        contents = files(PACKAGE) or []
    except PackageNotFoundError:
        raise ConfigError(f"found no package {PACKAGE}, wanted its libggml-base: {advice}") from None
    path = next((file.locate() for file in contents if file.name in LIBRARIES), None)
    if path is None:
        raise ConfigError(f"package {PACKAGE}: found none of {', '.join(LIBRARIES)} in it; {advice}")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),  # type, from, to
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),  # first weight, rows, columns
        ctypes.c_void_p,  # importance matrix
    ]
    return library


def _by_ggml(values: np.ndarray, of: QuantisationType) -> np.ndarray:
    """Quantise rows with llama.cpp's own function, without an importance matrix: [rows, columns] -> [rows, bytes of a row], uint8."""
    rows, columns = values.shape
    blocks = np.empty((rows, columns // of.block * of.block_bytes), dtype=np.uint8)
    ggml_base().ggml_quantize_chunk(int(of.code), values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    return blocks
