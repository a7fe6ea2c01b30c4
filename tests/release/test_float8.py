import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.checkpoint.model import load_model
from stages.checkpoint.reader import INDEX
from stages.errors import ConfigError, ReleaseError
from stages.quantisation.float8 import Float8
from stages.release import float8, loading
from stages.release.float8 import check_float8, require_float8, to_float8
from stages.release.packing import pack
from stages.release.zeros import read_zeros, write_zeros
from tests.release.llama_cpp.models import CONFIGS, fetched, pruned

LOADED = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
Q = "model.layers.0.self_attn.q_proj.weight"


def written(tmp_path, kind="llama"):
    """A base, its delta and the release in float8."""
    base = fetched(tmp_path, kind)
    delta = pruned(tmp_path, base)
    release = tmp_path / "release"
    release.mkdir()
    pack(base, delta, release)
    to_float8(release, delta)
    return base, delta, release


def test_a_matrix_in_scope_has_a_code_a_weight_and_a_scale_a_row(tmp_path):
    base, delta, release = written(tmp_path, "mistral")
    index = json.loads((release / INDEX).read_text())
    tensors = {name: tensor for shard in set(index["weight_map"].values()) for name, tensor in load_file(release / shard).items()}
    assert set(tensors) == set(index["weight_map"]) == set(base) | {f"{name}_scale" for name in delta}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert (tensors[Q].dtype, tensors[f"{Q}_scale"].shape) == (torch.float8_e4m3fn, (128, 1))
    assert torch.equal(tensors["lm_head.weight"], base.tensor("lm_head.weight"))
    section = json.loads((release / "config.json").read_text())["quantization_config"]
    assert (section["format"], section["ignore"]) == ("float-quantized", ["lm_head"])
    assert section["config_groups"]["group_0"]["input_activations"] is None


NOTHING, PLENTY = 0, 2**40  # bytes of free memory


@LOADED
def test_it_is_loaded_whole_where_the_weights_take_at_most_half_of_the_free_memory(tmp_path):
    base, delta, release = written(tmp_path)
    size = sum(base.stored(name).nbytes for name in base)
    assert check_float8(release, base, delta, 2 * size).loaded.loading == "whole"
    assert check_float8(release, base, delta, 2 * size - 1).loaded.loading == "streamed"


@LOADED
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_does_not_fit_is_compared_block_by_block_and_no_model_is_loaded(tmp_path, kind, monkeypatch):
    base, delta, release = written(tmp_path, kind)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("found a whole model in memory"))
    assert check_float8(release, base, delta, NOTHING).loaded.loading == "streamed"


@LOADED
@pytest.mark.parametrize(("free", "message"), [(PLENTY, "in stock transformers"), (NOTHING, "of the release, block by block,")])
def test_logits_that_differ_from_the_rounded_model_are_found(tmp_path, free, message):
    base, delta, release = written(tmp_path)
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ReleaseError, match=f"logits {message} differ from those of base \\+ delta, rounded to float8"):
        check_float8(release, base, delta, free)


@LOADED
def test_a_tensor_that_the_release_lacks_is_found_without_loading_it(tmp_path):
    base, delta, release = written(tmp_path)
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ReleaseError, match=r"stock transformers reports \{'missing_keys': \['model.layers.[23]."):
        check_float8(release, base, delta, NOTHING)


@LOADED
@pytest.mark.parametrize("kind", CONFIGS)
def test_its_section_of_the_config_is_valid_by_compressed_tensors_own_schema(tmp_path, kind):
    from compressed_tensors.quantization import QuantizationConfig

    _, _, release = written(tmp_path, kind)
    section = QuantizationConfig.model_validate(json.loads((release / "config.json").read_text())["quantization_config"]).model_dump(
        mode="json"
    )
    assert (section["quant_method"], section["format"], section["quantization_status"]) == (
        "compressed-tensors",
        "float-quantized",
        "compressed",
    )
    (group,) = section["config_groups"].values()
    assert group["weights"] | float8.WEIGHTS == group["weights"]
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)


@LOADED
@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_transformers_computes_the_logits_of_the_rounded_model(tmp_path, kind):
    base, delta, release = written(tmp_path, kind)
    counted = check_float8(release, base, delta)
    assert counted.weights == 2 * sum(row["zeros"] for row in delta.matrices)
    assert counted.weights / 2 <= counted.zeros < 0.52 * counted.weights
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32).eval()
    ours = load_model(base, Float8(delta), dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, ours(input_ids=tokens).logits)


def test_the_zeros_that_are_stated_are_those_of_the_written_codes(tmp_path):
    base, delta, release = written(tmp_path)
    write_zeros(release, delta)
    stated = read_zeros(release)
    assert stated.zeros == check_float8(release, base, delta).zeros >= stated.pruned


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda codes, pruned: codes.view(torch.uint8).masked_fill_(pruned, 8), "found 2048 pruned weights that are not zero, wanted none"),
        (lambda codes, pruned: codes.view(torch.uint8).masked_fill_(~pruned, 8), "its codes or scales are not those of the pruned weights"),
    ],
)
def test_written_codes_that_are_not_those_of_the_weights_are_found(tmp_path, damage, message):
    base, delta, release = written(tmp_path)
    shard = release / json.loads((release / INDEX).read_text())["weight_map"][Q]
    tensors = load_file(shard)
    damage(tensors[Q], ~delta.change(Q, base.tensor).mask)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ReleaseError, match=f"{Q}: {message}"):
        check_float8(release, base, delta)


def test_without_the_package_that_loads_it_nothing_is_written(tmp_path, monkeypatch):
    base = fetched(tmp_path, "llama")
    monkeypatch.setattr(float8, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="publish.dtype: found float8 without the package compressed-tensors, with which it is loaded"):
        require_float8(pruned(tmp_path, base))
