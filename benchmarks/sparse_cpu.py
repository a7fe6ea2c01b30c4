"""Does a runtime on a CPU gain from zeros? One layer of the size of an MLP's, with no, half and nine tenths of its weights zero.

python -m benchmarks.sparse_cpu

Measured are torch's dense product and its product by a CSR matrix, scipy's by a CSR matrix, ONNX Runtime's MatMul, and OpenVINO's dense
product and, for weights of 8 bits, with its property CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE. What is not installed is left out (pip install
openvino onnxruntime onnx).
All use one thread and compute y = W x in float32 for 1 and for 32 tokens. Writes benchmarks/sparse_cpu.json and the table in
docs/release.md. Takes a minute.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import scipy.sparse
import torch

from benchmarks import arguments
from benchmarks.markers import show_between
from stages import devices
from stages.files import write_json

FILE, DOCUMENT = Path("benchmarks/sparse_cpu.json"), Path("docs/release.md")
START, END = "<!-- sparse cpu: python -m benchmarks.sparse_cpu -->", "<!-- end of sparse cpu -->"
ROWS, COLUMNS = 5632, 2048
SPARSITIES, TOKENS = (0.0, 0.5, 0.9), (1, 32)
RUNS = 40
LIBRARIES = ("torch", "scipy", "onnxruntime", "openvino")

DENSE = "torch, dense"

Product = Callable[[], Any]
Runtime = Callable[[np.ndarray, np.ndarray, float], Product]  # [rows, columns], [columns, tokens], sparsity


def torch_dense(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    matrix, vectors = torch.from_numpy(weight), torch.from_numpy(inputs)
    return lambda: matrix @ vectors


def torch_csr(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    matrix, vectors = torch.from_numpy(weight).to_sparse_csr(), torch.from_numpy(inputs)
    return lambda: matrix @ vectors


def scipy_csr(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    matrix = scipy.sparse.csr_matrix(weight)
    return lambda: matrix @ inputs


def onnxruntime_dense(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    constant = numpy_helper.from_array(np.ascontiguousarray(weight), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, inputs.shape[1]]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["w", "x"], ["y"])], "product", [x], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": inputs})[0]


def openvino_dense(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    return openvino(weight, inputs, {})


def openvino_int8(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    return openvino(weight, inputs, {}, bits=8)


def openvino_int8_sparse(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> Product:
    """Whose weights are decompressed from their sparse form, if more of them are zero than the rate says."""
    return openvino(weight, inputs, {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": max(sparsity - 0.05, 0.0)}, bits=8)


def openvino(weight: np.ndarray, inputs: np.ndarray, settings: dict[str, Any], bits: int = 32) -> Product:
    """A compiled product. Args: settings: properties of the CPU. bits: of the stored weights, 32 or 8 with one scale."""
    import openvino as ov
    from openvino import opset13 as opset

    x = opset.parameter([inputs.shape[1], weight.shape[1]], ov.Type.f32)
    if bits == 32:
        stored = opset.constant(weight)
    else:
        scale = float(np.abs(weight).max()) / 127
        codes = opset.constant(np.round(weight / scale).astype(np.int8))
        stored = opset.multiply(opset.convert(codes, "f32"), opset.constant(np.float32(scale)))
    model = ov.Model([opset.matmul(x, stored, False, True)], [x])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", **settings})
    request, rows = compiled.create_infer_request(), np.ascontiguousarray(inputs.T)
    return lambda: request.infer([rows])


RUNTIMES: dict[str, Runtime] = {
    DENSE: torch_dense,
    "torch, CSR": torch_csr,
    "scipy, CSR": scipy_csr,
    "ONNX Runtime, dense": onnxruntime_dense,
    "OpenVINO, dense": openvino_dense,
    "OpenVINO, 8 bits": openvino_int8,
    "OpenVINO, 8 bits, sparse decompression": openvino_int8_sparse,
}
OPTIONAL = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}  # in the name of a runtime -> its library


def installed(library: str) -> str | None:
    """The version of a library, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def missing(name: str) -> str | None:
    """The library that a runtime needs, if it is not installed."""
    needed = [library for word, library in OPTIONAL.items() if word in name]
    return next((library for library in needed if installed(library) is None), None)


def milliseconds(product: Product) -> float:
    """The shortest of several runs: others may share the machine."""
    seconds = []
    for _ in range(RUNS):
        start = perf_counter()
        product()
        seconds.append(perf_counter() - start)
    return round(1e3 * min(seconds), 3)


def measured(runtime: Runtime, tokens: int) -> dict[str, float]:
    """Sparsity -> milliseconds."""
    generator, result = np.random.default_rng(0), {}
    weight = generator.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    drawn, inputs = generator.random((ROWS, COLUMNS)), generator.standard_normal((COLUMNS, tokens), dtype=np.float32)
    for sparsity in SPARSITIES:
        result[f"{sparsity:g}"] = milliseconds(runtime(weight * (drawn >= sparsity), inputs, sparsity))
    return result


def table(facts: dict[str, Any]) -> str:
    """Markdown: milliseconds, and how often faster than torch's dense product for as many tokens."""
    heads = [f"{sparsity:.0%} zeros" for sparsity in SPARSITIES]
    lines = [f"| runtime | tokens | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    dense = {row["tokens"]: row["milliseconds"]["0"] for row in facts["rows"] if row["runtime"] == DENSE}
    for row in facts["rows"]:
        cells = [f"{value:.2f} ms ({dense[row['tokens']] / value:.2f} ×)" for value in row["milliseconds"].values()]
        lines.append(f"| {row['runtime']} | {row['tokens']} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value is not None)
    said = f"Shortest of {RUNS} runs of W x, W of {ROWS} x {COLUMNS}, one thread, on {facts['device']}, with {versions}."
    return "\n".join([*lines, "", f"{said} In brackets: how often faster than torch's dense product without zeros."])


def main() -> None:
    torch.set_num_threads(1)
    versions = {library: installed(library) for library in LIBRARIES}
    runtimes = {name: run for name, run in RUNTIMES.items() if missing(name) is None}
    rows = [
        {"runtime": name, "tokens": tokens, "milliseconds": measured(run, tokens)} for tokens in TOKENS for name, run in runtimes.items()
    ]
    facts = {"rows": rows, "versions": versions, "device": devices.device_name(torch.device("cpu"))}
    write_json(FILE, facts)
    show_between(DOCUMENT, START, END, table(facts))


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
