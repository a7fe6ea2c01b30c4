import subprocess
import sys
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, ConfigError, ReleaseError
from stages.quantisation.ggml import TYPES, QuantisationType, quantised
from stages.release.llama_cpp import writing
from stages.release.llama_cpp.writing import FILE_TYPES, GgufWriter, write_checked
from stages.release.packing import pack
from stages.release.section import ZERO_KEEPING
from tests.project import ROOT
from tests.release.llama_cpp.models import CONFIGS, fetched, pruned

TEXT = "river stone  lamp 12,345\n\tdon't winter\u00fc \u65e5\u672c 12 garden"


def half_pruned(rows: int = 64, columns: int = 256) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * (torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5)


# Zeros.


def test_the_types_of_a_release_are_those_in_which_a_zero_stays_zero():
    weight = half_pruned()
    kept = {name: bool((quantised(weight, of)[weight == 0] == 0).all()) for name, of in TYPES.items()}
    assert {name for name, exact in kept.items() if exact} == set(ZERO_KEEPING) - {"F32"}
    assert {name for name, exact in kept.items() if not exact} == {"Q5_K", "Q5_1", "Q4_K", "Q2_K"}
    assert set(FILE_TYPES) == set(ZERO_KEEPING)


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_types_whose_table_of_values_has_no_zero_are_not_among_them(name):
    weight = half_pruned()
    made = quantised(weight, QuantisationType(name=name, native=True))
    assert (made - weight).abs().max() < 0.5
    assert (made[weight == 0] != 0).any()
    assert name not in ZERO_KEEPING


@pytest.mark.parametrize("wanted", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_each_pruned_weight_is_zero_in_the_file_and_counted(tmp_path, wanted):
    base = fetched(tmp_path, "llama")
    delta = pruned(tmp_path, base)
    writer = GgufWriter(base, delta, wanted)
    (counted,) = write_checked([writer], tmp_path, "org/small")
    masked = sum(int((~delta.change(name, base.tensor).mask).sum()) for name in delta)
    assert (counted.file, counted.weights, counted.otherwise) == (f"small-{wanted}.gguf", 2 * masked, 0)
    assert masked <= counted.zeros <= 1.4 * masked
    assert counted.zeros == masked or wanted not in ("F32", "BF16")
    assert writer.size < counted.bytes == (tmp_path / counted.file).stat().st_size


def test_a_file_in_which_a_pruned_weight_is_not_zero_is_refused(tmp_path):
    base = fetched(tmp_path, "llama")
    delta, path = pruned(tmp_path, base), tmp_path / "small.gguf"
    writer = GgufWriter(base, delta, "F32")
    writer.write(path)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}["blk.0.ffn_down.weight"]
    row, column = map(int, (~delta.change("model.layers.0.mlp.down_proj.weight", base.tensor).mask).nonzero()[0])
    there.data[row, column] = 1.0
    del there  # written back
    with pytest.raises(ReleaseError, match="small.gguf, blk.0.ffn_down.weight: found 1 pruned weights that are not zero, wanted none"):
        writer.check(path)


def test_a_file_of_another_type_or_model_is_refused(tmp_path):
    base = fetched(tmp_path, "llama")
    delta, path = pruned(tmp_path, base), tmp_path / "small.gguf"
    GgufWriter(base, delta, "Q8_0").write(path)
    with pytest.raises(ReleaseError, match=r"small.gguf, blk.0.ffn_down.weight: found Q8_0 of \[64, 96\], wanted F16 of \[64, 96\]"):
        GgufWriter(base, delta, "F16").check(path)


# What is refused before anything is written.


def test_rows_that_do_not_divide_into_blocks_are_refused_by_matrix_before_anything_is_written(tmp_path):
    base = fetched(tmp_path, "llama", intermediate_size=72)
    with pytest.raises(
        ArchitectureError, match=r"mlp.down_proj.weight: found a matrix of shape \[64, 72\], wanted columns in multiples of 32"
    ):
        GgufWriter(base, pruned(tmp_path, base), "Q8_0")


def test_matrices_of_other_types_are_counted(tmp_path):
    base = fetched(tmp_path, "llama")
    (counted,) = write_checked([GgufWriter(base, pruned(tmp_path, base), "Q3_K")], tmp_path, "small")
    assert counted.otherwise == 14  # rows of 64 and 96 are no multiples of 256: Q4_0 instead


def test_a_tensor_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    base = fetched(tmp_path, "llama")
    delta = pruned(tmp_path, base)
    base.shard_of["model.layers.0.mlp.extra.weight"] = next(iter(base.shard_of.values()))
    with pytest.raises(
        ArchitectureError, match="llama as GGUF: found no name for model.layers.0.mlp.extra.weight in llama.cpp; leave gguf"
    ):
        GgufWriter(base, delta, "F16")


# Read by others.


def released(directory, base: Checkpoint, delta):
    (directory / "release").mkdir()
    pack(base, delta, directory / "release")
    return AutoModelForCausalLM.from_pretrained(directory / "release", dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])  # of the others it reads no width of a head, or no type
def test_transformers_reads_the_tensors_of_the_checkpoint(tmp_path, kind):
    base = fetched(tmp_path, kind)
    delta = pruned(tmp_path, base)
    wanted = released(tmp_path, base, delta).state_dict()
    write_checked([GgufWriter(base, delta, "F32")], tmp_path, "small")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small-F32.gguf", dtype=torch.float32).state_dict()
    assert set(read) == set(wanted)
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_logits_of_transformers(tmp_path, kind):
    """In a process of its own: its libggml-base and that of the extra `ruler` have the same names."""
    base = fetched(tmp_path, kind)
    delta = pruned(tmp_path, base)
    model, tokenizer = released(tmp_path, base, delta), AutoTokenizer.from_pretrained(tmp_path / "release")
    write_checked([GgufWriter(base, delta, "F32")], tmp_path, "small")
    arguments = [str(tmp_path / "small-F32.gguf"), TEXT, str(tmp_path / "scored.npz")]
    subprocess.run([sys.executable, "-m", "tests.release.llama_cpp.score", *arguments], cwd=ROOT, check=True)
    scored = np.load(tmp_path / "scored.npz")
    assert scored["tokens"].tolist() == tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(scored["tokens"])[None]).logits[0].numpy()
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(scored["logits"], wanted, rtol=0, atol=0.01 * np.abs(wanted).max())


def test_frequencies_that_llama_cpp_computes_are_left_out(tmp_path):
    base = fetched(tmp_path, "llama")
    delta, shard = pruned(tmp_path, base), base.directory / sorted(base.headers)[0]
    save_file({**load_file(shard), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, shard)
    old = Checkpoint(base.directory)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in old
    plan = GgufWriter(old, delta, "F16").plan
    assert {stored.name for stored in plan} == {stored.name for stored in GgufWriter(base, delta, "F16").plan}


def test_a_type_that_wants_another_package_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
    def missing() -> None:
        raise ConfigError("found no package libggml-python")

    base = fetched(tmp_path, "llama", hidden_size=256, intermediate_size=256)
    delta = pruned(tmp_path, base)
    monkeypatch.setattr(writing, "ggml_base", missing)
    GgufWriter(base, delta, "F16")
    with pytest.raises(ConfigError, match="found no package libggml-python"):
        GgufWriter(base, delta, "Q6_K")
