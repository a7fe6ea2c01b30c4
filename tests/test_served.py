"""vLLM's rule on sparsity_config, read out of its source: here out of a stand-in, and out of the real one where VLLM_SOURCE names it."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.served import FOLDER, METHODS, reader, refusal, said, table, version_of
from stages.errors import ReleaseError
from stages.release.float8 import to_float8
from stages.release.packing import pack
from tests.release.llama_cpp.models import fetched, pruned

pytest.importorskip("compressed_tensors")
UTILS = """
from compressed_tensors import CompressionFormat
from vllm.not_installed import something

def is_activation_quantization_format(format: something) -> bool:
    return format == CompressionFormat.float_quantized.value
"""
READER = """
from typing import Literal
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationArgs
from vllm.not_installed import Base

SPARSITY_CONFIG_NAME: Literal["sparsity_config"] = "sparsity_config"

class CompressedTensorsConfig(Base):
    def __init__(self) -> None:
        raise RuntimeError("it is never made")

    @classmethod
    def _parse_sparsity_config(cls, config: Base) -> None:
        stated = config.get(SPARSITY_CONFIG_NAME)
        if stated and SparsityCompressionConfig.model_validate(stated).targets:
            raise DeprecationWarning("no sparsity any more")

    @classmethod
    def _quantization_scheme_map_from_config(cls, config: Base) -> Base:
        assert is_activation_quantization_format(config["format"]), "no such format"
        schemes = {}
        for group in config["config_groups"].values():
            for target in group["targets"]:
                weights = QuantizationArgs.model_validate(group["weights"])
                schemes[target] = {"weights": weights, "input_activations": group.get("input_activations"), "format": None}
        return schemes

    @staticmethod
    def _is_fp8_w8a16(weights: Base, inputs: Base) -> bool:
        return weights.num_bits == 8
"""
FLOAT8 = "Linear: weights of type float in 8 bits by channel, inputs as they are, fit for the scheme W8A16Fp8"


@pytest.fixture()
def source(tmp_path) -> Path:
    """A source with the functions that are wanted, of a package that cannot be imported."""
    (tmp_path / "vllm-source" / FOLDER).mkdir(parents=True)
    (tmp_path / "vllm-source" / FOLDER / "utils.py").write_text(UTILS)
    (tmp_path / "vllm-source" / FOLDER / "compressed_tensors.py").write_text(READER)
    (tmp_path / "vllm-source/PKG-INFO").write_text("Metadata-Version: 2.4\nName: vllm\nVersion: 1.2.3\n")
    return tmp_path / "vllm-source"


def configs(directory: Path) -> dict[str, dict]:
    """config.json of a plain release and of one in float8."""
    base = fetched(directory, "llama")
    delta, release = pruned(directory, base), directory / "release"
    release.mkdir()
    pack(base, delta, release)
    plain = json.loads((release / "config.json").read_text())
    to_float8(release, delta)
    return {"plain": plain, "float8": json.loads((release / "config.json").read_text())}


def test_both_kinds_of_release_are_taken_and_a_sparsity_config_is_not(source, tmp_path):
    vllm, known = reader(source), configs(tmp_path)
    assert said(vllm, known["plain"]) == "no quantization_config: the weights as they are"
    assert said(vllm, known["float8"]) == FLOAT8
    assert refusal(vllm) == "refused, DeprecationWarning: no sparsity any more"
    known["float8"]["quantization_config"]["format"] = "dense"
    assert said(vllm, known["float8"]) == "refused, AssertionError: no such format"


@pytest.mark.skipif("VLLM_SOURCE" not in os.environ, reason="VLLM_SOURCE names no directory of vLLM's source")
def test_vllms_own_code_takes_both_kinds_of_release_and_refuses_a_sparsity_config(tmp_path):
    vllm, known = reader(Path(os.environ["VLLM_SOURCE"])), configs(tmp_path)
    assert said(vllm, known["plain"]) == "no quantization_config: the weights as they are"
    assert said(vllm, known["float8"]) == FLOAT8
    assert refusal(vllm).startswith("refused, DeprecationWarning: Sparsity support has been removed")


def test_a_rule_that_is_gone_is_said(source):
    path = source / FOLDER / "compressed_tensors.py"
    path.write_text(READER.replace("raise DeprecationWarning", "print"))
    with pytest.raises(ReleaseError, match="vLLM: found Linear: .* for a sparsity_config, wanted a refusal, as docs/release.md says"):
        refusal(reader(source))


@pytest.mark.parametrize("name", ["SPARSITY_CONFIG_NAME", "CompressedTensorsConfig", *METHODS])
def test_a_function_that_is_not_there_is_named(source, name):
    path = source / FOLDER / "compressed_tensors.py"
    path.write_text(READER.replace(name, f"Other{name}"))
    with pytest.raises(ReleaseError, match=f"compressed_tensors.py: found no {name}, wanted the source of vLLM as of 0.33.0"):
        reader(source)


def test_the_table_has_the_releases_the_rule_and_the_versions(source):
    rows = [{"model": "org/a", "dtype": "plain", "said": "yes"}]
    facts = {"releases": rows, "rule": "refused, E: no", "vllm": version_of(source), "compressed_tensors": "0.20.0"}
    assert "| org/a, plain | yes |\n| any, with a sparsity_config that has targets | refused, E: no |\n\nBy vLLM 1.2.3," in table(facts)
