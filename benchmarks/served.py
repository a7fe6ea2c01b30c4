"""What vLLM's own code says of the config.json of a release.

pip download --no-deps --no-binary :all: vllm && tar xzf vllm-*.tar.gz      (building its metadata wants setuptools_rust and torch)
python -m benchmarks.served vllm-0.33.0 release out/float8 ...

vLLM wants CUDA, so nothing of it is imported. Of its source, ast takes the functions that read a quantization_config, with what they
import of compressed-tensors; these alone are run: on the section of each release, then on the section of one in float8 that has a
sparsity_config as well, which they must refuse. Needs the extra float8. Writes benchmarks/served.json and the table in docs/release.md.
"""

import argparse
import ast
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.markers import show_between
from stages.errors import ReleaseError
from stages.files import read_json, write_json
from stages.release.float8 import WEIGHTS

FILE, DOCUMENT = Path("benchmarks/served.json"), Path("docs/release.md")
START, END = "<!-- served: python -m benchmarks.served -->", "<!-- end of served -->"
FOLDER = Path("vllm/model_executor/layers/quantization/compressed_tensors")
IMPORTED = ("compressed_tensors", "typing")  # the only packages that what is taken may import
CONFIG = "CompressedTensorsConfig"  # its class that reads the section
TAKEN = {  # file -> names of what is taken from it
    "utils.py": ("is_activation_quantization_format",),
    "compressed_tensors.py": ("SPARSITY_CONFIG_NAME", CONFIG),
}
METHODS = ("_parse_sparsity_config", "_quantization_scheme_map_from_config", "_is_fp8_w8a16")
SPARSE = {"format": "sparse-bitmask", "targets": ["Linear"]}
REFUSALS = (AssertionError, DeprecationWarning, NotImplementedError, ValueError)


def reader(source: Path) -> Any:
    """The class of vLLM that reads a quantization_config, with METHODS alone.

    Args:
        source: directory of vLLM's source.

    Raises:
        ReleaseError: the source has no such function any more; names it.
    """
    names: dict[str, Any] = {}
    for file, wanted in TAKEN.items():
        path = source / FOLDER / file
        taken = [*_imports(tree := ast.parse(path.read_text(encoding="utf8"))), *(_named(tree, name, path) for name in wanted)]
        annotations = ast.parse("from __future__ import annotations").body  # which name what is not taken
        exec(compile(ast.Module(body=[*annotations, *taken], type_ignores=[]), str(path), "exec"), names)
    return names[CONFIG]


def _imports(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPORTED]


def _named(tree: ast.Module | ast.ClassDef, name: str, path: Path) -> ast.stmt:
    """What has a name at the top of a module or class; of the class CONFIG its METHODS alone, without its bases."""
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else node
        if name == getattr(target, "name", getattr(target, "id", None)):
            if isinstance(node, ast.ClassDef):
                node.bases, node.body = [], [_named(node, method, path) for method in METHODS]
            return node
    raise ReleaseError(f"{path}: found no {name}, wanted the source of vLLM as of 0.33.0")


def said(vllm: Any, config: dict[str, Any]) -> str:
    """What vLLM takes a model for, by its config.json; with which error it refuses it.

    Args:
        vllm: see reader.
    """
    section = config.get("quantization_config")
    if section is None:
        return "no quantization_config: the weights as they are"
    try:
        vllm._parse_sparsity_config(config=section)
        schemes = vllm._quantization_scheme_map_from_config(config=section)
    except REFUSALS as error:
        return f"refused, {type(error).__name__}: {error}"
    return "; ".join(f"{target}: {_scheme(vllm, **parts)}" for target, parts in schemes.items())


def _scheme(vllm: Any, *, weights: Any, input_activations: Any, **_: Any) -> str:
    kind = f"{'' if vllm._is_fp8_w8a16(weights, input_activations) else 'not '}fit for the scheme W8A16Fp8"
    inputs, stated = "inputs as they are" if input_activations is None else "inputs quantised", weights.model_dump(mode="json")
    return f"weights of type {stated['type']} in {stated['num_bits']} bits by {stated['strategy']}, {inputs}, {kind}"


def refusal(vllm: Any) -> str:
    """The words of the rule: a section as a release in float8 has it, with a sparsity_config.

    Raises:
        ReleaseError: it is not refused.
    """
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    section = {"format": "float-quantized", "config_groups": {"group_0": group}, "sparsity_config": SPARSE}
    words = said(vllm, {"quantization_config": section})
    if not words.startswith("refused"):
        raise ReleaseError(f"vLLM: found {words} for a sparsity_config, wanted a refusal, as docs/release.md says")
    return words


def version_of(source: Path) -> str:
    """vLLM's version, as its sdist states it."""
    lines = (source / "PKG-INFO").read_text(encoding="utf8").splitlines()
    return next(line for line in lines if line.startswith("Version: ")).removeprefix("Version: ")


def table(facts: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| release | vLLM's code says |", "|---|---|"]
    lines += [f"| {row['model']}, {row['dtype']} | {row['said']} |" for row in facts["releases"]]
    by = f"vLLM {facts['vllm']}, its functions alone, with compressed-tensors {facts['compressed_tensors']}"
    return "\n".join([*lines, f"| any, with a sparsity_config that has targets | {facts['rule']} |", "", f"By {by}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="What vLLM's own code says of the config.json of a release.")
    parser.add_argument("source", type=Path, help="directory of vLLM's source")
    parser.add_argument("releases", nargs="+", type=Path, metavar="RELEASE")
    arguments = parser.parse_args()
    vllm, rows = reader(arguments.source), []
    for release in arguments.releases:
        config = read_json(release / "config.json")
        dtype = "float8" if "quantization_config" in config else "plain"
        rows.append({"model": read_json(release / "provenance.json")["base"]["name"], "dtype": dtype, "said": said(vllm, config)})
    versions = {"vllm": version_of(arguments.source), "compressed_tensors": version("compressed-tensors")}
    facts = {"releases": rows, "rule": refusal(vllm), **versions}
    write_json(FILE, facts)
    show_between(DOCUMENT, START, END, table(facts))


if __name__ == "__main__":
    main()
