"""Publishing what the stages left, some of them run by hand with other values than params.yaml has."""

import getpass
import json
import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from stages import prune, publish
from stages.checkpoint.delta import Change, SparseDelta, read_block, write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.config import sections as configuration
from stages.config.compose import composed, read
from stages.config.environment import Environment, installed
from stages.config.params import CONF
from stages.errors import ArchitectureError, CheckpointError, ComparisonError, ConfigError, ReleaseError, SparsesweepError
from stages.evaluation.measurement import Difference, Kind, Measurement, as_rows
from stages.evaluation.protocol import versions
from stages.files import (
    BASE,
    CALIBRATION,
    DENSE_RESULTS,
    FLOAT8_RESULTS,
    PRUNE_RESULTS,
    RELEASE,
    SPARSE,
    SPARSE_RESULTS,
    TEXT,
    read_json,
    sha256,
    write_json,
)
from stages.release.__main__ import main as release_commands
from stages.release.naming import default_name
from stages.release.section import CONTENTS, Publish
from stages.release.zeros import read_zeros
from stages.schema import check
from tests import project as projects

ROOT = CONF.parent
DATA_FILE = {"reader": "rows", "text": "text", "messages": "messages", "role": "role", "content": "content"}
TEXTS = {
    "calibration": {"pages": {**DATA_FILE, "source": "local", "path": None, "sha256": "1" * 64, "license": "cc0-1.0"}},
    "evaluation": {
        name: {**DATA_FILE, "source": "local", "path": None, "sha256": "1" * 64, "license": "CC-BY-SA"} for name in ("news", "boolq")
    },
}
DRAWN = {
    "name": "tiny",
    "windows": 4,
    "held_out": 2,
    "window_length": 32,
    "bos": "auto",
    "seed": 0,
    "overlap_tokens": 13,
    "max_overlap": 0,
    "max_refused": 0.0,
    "sources": {"pages": {"sampler": "document", "weight": 1.0}},
}
EVALUATION = {
    "name": "tiny",
    "device": "auto",
    "dtype": "auto",
    "bos": "auto",
    "corpora": {"news": {"window_length": 64, "windows": 4, "evenly": False}},
    "metrics": ["perplexity"],
    "tasks": ["boolq"],
    "rows": 20,
    "few_shot": None,
    "styles": ["raw"],
    "examples": 5,
    "system_prompt": "You are a helpful assistant.",
    "batch_size": 4,
    "streamed": False,
    "generations": {"new_tokens": 3, "prompts": ["river stone"]},
}


def fetch(canonical: Path) -> None:
    """What the fetch stage leaves."""
    shutil.copytree(canonical, BASE)
    section = {"source": "local", "path": None, "name": "tests/tiny", "fingerprint": None, "license": "mit"}
    edit(BASE / "provenance.json", section=section)
    files = {
        f"{part}/{name}.jsonl": {"license": source["license"], "sha256": name}
        for part, own in TEXTS.items()
        for name, source in own.items()
    }
    TEXT.mkdir()
    write_json(TEXT / "provenance.json", {"section": TEXTS, "files": files})


def sample(seed: int = 0) -> None:
    """What the sample stage leaves."""
    CALIBRATION.mkdir(exist_ok=True)
    windows = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(seed))
    save_file({"windows": windows, "held_out": windows.roll(7, dims=1)[:2].clone()}, CALIBRATION / "windows.safetensors")
    facts = {
        "section": {**DRAWN, "seed": seed},
        "base": Checkpoint(BASE).fingerprint,
        "tokenizer_sha256": Checkpoint(BASE).tokenizer_sha256,
        "bos": {"token": None, "reason": "of the test"},
        "windows_sha256": sha256(CALIBRATION / "windows.safetensors"),
        "sources": {"pages": {"sampler": "document", "sha256": "pages", "windows": []}},
    }
    write_json(CALIBRATION / "provenance.json", facts)


def prune_by_hand(*overrides: str) -> SparseDelta:
    """Run the prune stage."""
    sections = read("prune.device=cpu", *overrides)
    prune.main.function(**{name: sections[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune")})
    return SparseDelta(SPARSE, Checkpoint(BASE).fingerprint)


def measurements(part: str, perplexity: float) -> list[Measurement]:
    """Of perplexity, a task, and the mean of tasks."""
    corpus = {"kind": Kind.CORPUS, "name": "news", "count": 252, "counted": "tokens", "clusters": 4}
    task = {"kind": Kind.TASK, "name": "boolq", "metric": "acc", "label": "accuracy", "count": 20, "counted": "rows", "clusters": 1}
    mean = {**task, "kind": Kind.MEAN, "name": "tasks", "metric": "accuracy", "label": "mean accuracy, every task alike"}
    if part == "dense":
        first = Measurement(**corpus, metric="perplexity", label="perplexity", value=perplexity, stderr=1.0)
        return [first, Measurement(**task, value=0.5, stderr=0.1), Measurement(**mean, value=0.5, stderr=0.1)]
    there = read_json(DENSE_RESULTS / "details/measurements.json")[0]["value"]
    ratio, equal = perplexity / there, Difference(value=0.0)
    return [
        Measurement(**corpus, metric="perplexity", label="perplexity", value=perplexity, stderr=1.0, dense=there),
        Measurement(**corpus, metric="perplexity_ratio", label="perplexity over dense", value=ratio, stderr=0.05),
        Measurement(**corpus, metric="perplexity_ln_ratio", label="ln", value=math.log(ratio), stderr=0.05 / ratio),
        Measurement(**task, value=0.5, stderr=0.1, dense=0.5, difference=equal),
        Measurement(**mean, value=0.5, stderr=0.1, dense=0.5, difference=equal),
    ]


def evaluate(part: str, perplexity: float, evaluation: dict[str, Any] = EVALUATION) -> None:
    """What the evaluate stage leaves."""
    directory, base = DENSE_RESULTS if part == "dense" else SPARSE_RESULTS, Checkpoint(BASE).fingerprint
    delta = SparseDelta(SPARSE, base).fingerprint if part == "sparse" else None
    windows = {"window_length": evaluation["corpora"]["news"]["window_length"], "windows": 4, "tokens": 256, "windows_sha256": "w"}
    protocol = {
        "evaluation": evaluation,
        "delta": delta,
        "base": base,
        "tokenizer_sha256": "t",
        "bos": None,
        "corpora": {"news": {"sha256": "news", **windows}},
        "metrics": ["perplexity"],
        "tasks": {"boolq": {"rows": 20, "sha256": "boolq", "few_shot": 0, "metrics": ["acc"], "source": "text.evaluation"}},
        "styles": {},
        "prompts": ["river stone"],
        "new_tokens": 3,
        "dtype": "float32",
        "versions": versions(),
    }
    counts = {"rows": 20, "clusters": 1, "lost": 2, "gained": 2, "p_value": 1.0}
    apart = {"dense": 0.5, "sparse": 0.5, "difference": 0.0, "stderr": None, "low": None, "high": None}
    (directory / "details").mkdir(parents=True, exist_ok=True)
    write_json(directory / "details/measurements.json", as_rows(measurements(part, perplexity)))
    write_json(directory / "details/paired.json", [{"task": "boolq", "metric": "acc", **counts, **apart}])
    write_json(directory / "details/protocol.json", protocol)
    write_json(directory / "run.json", {"device": "a CPU", "generation": {"tokens": 3, "seconds": 1.5, "tokens_per_second": 2.0}})
    write_json(directory / "details/generations.json", [{"prompt": "river stone", "raw_dense": "lamp", "raw_sparse": "lamp lamp"}])


def edit(path: Path, **changes: Any) -> None:
    """Other values for some keys of a JSON file."""
    write_json(path, {**read_json(path), **changes})


def run(name: str | None = None, **changes: Any) -> None:
    """Run the publish stage."""
    section = Publish(**{**asdict(read()["publish"]), "name": name, **changes})
    check(section, "publish")
    environment = Environment(**{field.name: installed(field.name) for field in fields(Environment)})
    publish.main.function(environment=environment, **{f"publish_{key}": getattr(section, key) for key in CONTENTS})


@pytest.fixture(scope="module")
def finished(canonical, tmp_path_factory) -> Path:
    """A project in which every stage but publish ran, at 50%."""
    directory, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(directory)
    try:
        fetch(canonical)
        sample()
        prune_by_hand()
        evaluate("dense", 20.0)
        evaluate("sparse", 45.0)
    finally:
        os.chdir(before)
    return directory


@pytest.fixture()
def project(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def params() -> dict[str, Any]:
    return yaml.safe_load((RELEASE / "params.yaml").read_text())


# What is published is what was recorded.


def sections_on_any_machine(delta: SparseDelta) -> dict[str, Any]:
    """The recipe's sections, and what stands for the machine and for what it keeps, of which a recipe says nothing."""
    silent = {"device": "auto", "memory_budget": None, "statistics": "none"}
    assert not set(silent) & set(delta.recipe.prune)
    return delta.recipe.sections | {"prune": silent | delta.recipe.prune}


def test_the_release_has_what_every_stage_recorded(project):
    run()
    delta = SparseDelta(SPARSE, Checkpoint(BASE).fingerprint)
    written = params()
    assert list(written) == [
        "environment",
        "base",
        "text",
        "calibration",
        "method",
        "pattern",
        "allocation",
        "reconstruction",
        "prune",
        "evaluation",
        "ruler",
        "publish",
    ]
    assert written["base"] == read_json(BASE / "provenance.json")["section"]
    assert (written["text"], written["calibration"], written["evaluation"]) == (TEXTS, DRAWN, EVALUATION)
    assert {name: written[name] for name in delta.recipe.sections} == sections_on_any_machine(delta)
    assert written["publish"] == asdict(read()["publish"])
    assert "# tiny-wanda-sparse50\n" in (RELEASE / "README.md").read_text()
    assert (RELEASE / "provenance.json").is_file()


def test_the_published_params_are_a_valid_configuration_once_private_paths_are_set(project):
    run()
    written = params()
    written["base"]["path"] = "here"
    for part in written["text"].values():
        for source in part.values():
            source["path"] = "here.jsonl"
    sections = configuration.read(OmegaConf.create(written))
    assert asdict(sections["pattern"]) == {"name": "unstructured", "sparsity": 0.5}


def test_results_of_the_delta_before_are_refused_and_after_another_evaluation_the_new_recipe_is_published(project):
    run()
    prune_by_hand("pattern.sparsity=0.6")
    message = rf"{SPARSE_RESULTS}/details/protocol.json: found results of delta [0-9a-f]{{12}}, wanted [0-9a-f]{{12}}; "
    with pytest.raises(ReleaseError, match=message + "run python -m stages.evaluate part=sparse"):
        run()
    assert params()["pattern"]["sparsity"] == 0.5  # the release before is as it was
    evaluate("sparse", 60.0)
    run()
    assert params()["pattern"]["sparsity"] == 0.6
    card = (RELEASE / "README.md").read_text()
    assert "# tiny-wanda-sparse60\n" in card
    assert re.search(r"with (59|60)\.?\d*% of the weights", card)
    assert "60.00 ± 1.00" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: sample(seed=1),
            rf"{CALIBRATION}/provenance.json: found windows with SHA-256 [0-9a-f]{{12}}, wanted [0-9a-f]{{12}}; run python -m stages.prune",
        ),
        (
            lambda: edit(CALIBRATION / "provenance.json", base="f" * 64),
            rf"{CALIBRATION}/provenance.json: found windows drawn for base f{{12}}, wanted [0-9a-f]{{12}}; run python -m stages.sample",
        ),
        (
            lambda: edit(PRUNE_RESULTS / "provenance.json", pattern={"name": "unstructured", "sparsity": 0.7}),
            rf"{PRUNE_RESULTS}/provenance.json: found another recipe: pattern {{.*0.7}}, wanted {{.*0.5}}; run python -m stages.prune",
        ),
        (
            lambda: edit(SPARSE_RESULTS / "details/protocol.json", base="f" * 64),
            rf"{SPARSE_RESULTS}/details/protocol.json: found results of base f{{12}}, wanted [0-9a-f]{{12}}; "
            "run python -m stages.evaluate part=sparse",
        ),
        (
            lambda: edit(SPARSE_RESULTS / "details/protocol.json", delta=None),
            rf"{SPARSE_RESULTS}/details/protocol.json: found results of delta None, wanted [0-9a-f]{{12}}; "
            "run python -m stages.evaluate part=sparse",
        ),
        (
            lambda: edit(DENSE_RESULTS / "details/protocol.json", base="f" * 64),
            rf"{DENSE_RESULTS}/details/protocol.json: found results of base f{{12}}, wanted [0-9a-f]{{12}}; "
            "run python -m stages.evaluate part=dense",
        ),
        (
            lambda: edit(DENSE_RESULTS / "details/protocol.json", delta="f" * 64),
            "results/dense/details/protocol.json: found results of delta f{12}, wanted None; run python -m stages.evaluate part=dense",
        ),
        (
            lambda: evaluate("dense", 20.0, {**EVALUATION, "corpora": {"news": {"window_length": 32, "windows": 4, "evenly": False}}}),
            rf"{DENSE_RESULTS}/details/protocol.json and {SPARSE_RESULTS}/details/protocol.json are not of the same protocol, "
            "wanted equal values of corpora.news.window_length: 32 against 64; run python -m stages.evaluate part=dense",
        ),
        (
            lambda: edit(DENSE_RESULTS / "details/protocol.json", new_tokens=4),
            "wanted equal values of new_tokens: 4 against 3; run python -m stages.evaluate part=dense",
        ),
        (
            lambda: evaluate("dense", 21.0),
            rf"{SPARSE_RESULTS}/details/measurements.json: found news compared with a perplexity of 20.0, wanted 21.0; "
            "run python -m stages.evaluate part=sparse",
        ),
        (
            lambda: edit(TEXT / "provenance.json", files={"calibration/pages.jsonl": {"sha256": "other"}}),
            rf"{TEXT}/provenance.json: found calibration/pages.jsonl with SHA-256 'other', wanted 'pages'; run python -m stages.sample",
        ),
        (
            lambda: edit(TEXT / "provenance.json", files={"calibration/pages.jsonl": {"sha256": "pages"}}),
            rf"{TEXT}/provenance.json: found evaluation/news.jsonl with SHA-256 None, wanted 'news'; "
            "run python -m stages.evaluate part=dense",
        ),
        (
            lambda: edit(
                TEXT / "provenance.json", files={**read_json(TEXT / "provenance.json")["files"], "evaluation/boolq.jsonl": {"sha256": "x"}}
            ),
            rf"{TEXT}/provenance.json: found evaluation/boolq.jsonl with SHA-256 'x', wanted 'boolq'; "
            "run python -m stages.evaluate part=dense",
        ),
        (
            lambda: edit(BASE / "provenance.json", section=None),
            f"{BASE}/provenance.json: found no section, wanted the configuration that made it; run python -m stages.fetch part=base",
        ),
        (
            lambda: edit(TEXT / "provenance.json", section=None),
            f"{TEXT}/provenance.json: found no section, wanted the configuration that made it; run python -m stages.fetch part=text",
        ),
        (
            lambda: edit(CALIBRATION / "provenance.json", section=None),
            f"{CALIBRATION}/provenance.json: found no section, wanted the configuration that made it; run python -m stages.sample",
        ),
        (
            lambda: edit(SPARSE_RESULTS / "details/protocol.json", evaluation=None),
            f"{SPARSE_RESULTS}/details/protocol.json: found no evaluation, wanted the configuration that made it; "
            "run python -m stages.evaluate part=sparse",
        ),
    ],
)
def test_what_does_not_belong_to_the_delta_is_refused_before_anything_is_written(project, change, message):
    change()
    with pytest.raises((ReleaseError, ComparisonError), match=message):
        run()
    assert not list(project.glob("*release*"))


@pytest.mark.parametrize("file", [PRUNE_RESULTS / "provenance.json", SPARSE_RESULTS / "details/protocol.json"], ids=str)
def test_results_of_another_version_of_a_library_are_refused(project, file):
    for path in {file, DENSE_RESULTS / "details/protocol.json"} if "details" in str(file) else {file}:
        edit(path, versions={**read_json(path)["versions"], "torch": "1.2.3+cpu"})
    with pytest.raises(ReleaseError, match=f"{file}: found results of torch '1.2.3', wanted '2.*'; run python -m stages"):
        run()


def test_a_file_that_is_missing_is_named(project):
    (DENSE_RESULTS / "details/protocol.json").unlink()
    with pytest.raises(SparsesweepError, match=f"{DENSE_RESULTS}/details/protocol.json: not found; has the stage that writes it run?"):
        run()


def test_the_delta_of_another_base_is_refused(project):
    edit(BASE / "provenance.json", files={"model.safetensors": "other"})
    with pytest.raises(CheckpointError, match=f"{SPARSE}: a delta of base [0-9a-f]{{12}}, wanted one of base [0-9a-f]{{12}}"):
        run()


def test_a_delta_that_was_edited_is_refused_by_its_hashes(project):
    block = SPARSE / "block-00000.safetensors"
    changes = read_block(block, Checkpoint(BASE).tensor)
    name, change = next(iter(changes.items()))
    changes[name] = Change(mask=~change.mask)
    write_block(block, changes, Checkpoint(BASE).fingerprint)
    with pytest.raises(CheckpointError, match="block-00000.safetensors: found SHA-256 [0-9a-f]{64}, wanted [0-9a-f]{64}"):
        run()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=sparsegpt", "pattern.sparsity=0.29"],
        ["method=sparsegpt", "method.comparison_group=row", "allocation=owl"],
        ["method=ria", "allocation=alphapruning"],
        ["method=swaps_least_squares", "allocation=loss", "allocation.windows=2"],
        ["method=dsnot", "pattern=nm_2_4_permuted"],
        ["method=admm_short", "pattern=nm_4_8", "prune=one_pass"],
        ["reconstruction=distilled", "pattern.sparsity=0.7"],
    ],
    ids=",".join,
)
def test_every_kind_of_recipe_is_met_and_published_under_a_name_of_its_own(project, overrides):
    delta = prune_by_hand(*overrides)
    evaluate("sparse", 45.0)
    run()
    assert {name: params()[name] for name in delta.recipe.sections} == sections_on_any_machine(delta)
    assert default_name("tests/tiny", delta.recipe) != "tiny-wanda-sparse50"
    assert f"# {default_name('tests/tiny', delta.recipe)}\n" in (RELEASE / "README.md").read_text()


# Nothing is left of a release that fails its checks.


def test_a_release_whose_pattern_is_short_of_one_weight_is_not_written(project):
    delta = SparseDelta(SPARSE, Checkpoint(BASE).fingerprint)
    block, rows = SPARSE / "block-00000.safetensors", delta.matrices
    changes = read_block(block, Checkpoint(BASE).tensor)
    change = changes[rows[0]["tensor"]]
    mask = change.mask
    column = int((~mask[0]).nonzero()[0])
    mask[0, column] = True
    changes[rows[0]["tensor"]] = Change(mask=mask, values=change.values, rows=change.rows, columns=change.columns)
    write_block(block, changes, delta.recipe.base)
    rows[0]["zeros"] -= 1
    rows[0]["sparsity"] = rows[0]["zeros"] / rows[0]["weights"]
    sparsity = sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows)
    write_manifest(SPARSE, recipe=delta.recipe, summary={**delta.summary, "sparsity": sparsity}, matrices=rows)
    evaluate("sparse", 45.0)
    with pytest.raises(ReleaseError, match=rf"{re.escape(rows[0]['matrix'])}, row 0: found \d+ zeros, wanted \d+ or more by the recipe"):
        run()
    assert not list(project.glob("*release*")) + list(project.glob(".release*"))


@pytest.mark.parametrize("name", ["a b", "a--b", "-a", "a" * 97, "a/b/c", ""])
def test_a_name_that_the_hub_does_not_take_is_refused(project, name):
    with pytest.raises(ConfigError, match=f"publish.name: found '{name}', wanted null or a name of letters, digits"):
        run(name)


def test_a_name_that_the_user_gave_is_used(project):
    run("org/mine_sparse05")
    assert "# org/mine_sparse05\n" in (RELEASE / "README.md").read_text()
    assert params()["publish"] == {**asdict(read()["publish"]), "name": "org/mine_sparse05"}


# Files for llama.cpp.


def test_files_for_llama_cpp_stand_beside_the_checkpoint_under_its_name_and_on_its_card(project):
    run(formats=["safetensors", "gguf"], gguf_types=["BF16", "F16"])
    card = (RELEASE / "README.md").read_text()
    delta = SparseDelta(SPARSE, Checkpoint(BASE).fingerprint)
    zeros = sum(row["zeros"] for row in delta.matrices)
    for name in ("tiny-wanda-sparse50-BF16.gguf", "tiny-wanda-sparse50-F16.gguf"):
        assert (RELEASE / name).is_file()
        assert f"| `{name}` |" in card
    assert re.search(rf"BF16.gguf` \| [\d,]+ \| {zeros:,} \| {2 * zeros:,} \|", card)
    assert "BF16.gguf\n" in (RELEASE / "SHA256SUMS").read_text()


def test_what_llama_cpp_has_no_type_for_is_refused_before_anything_is_written(project):
    rows = r"found a matrix of shape \[112, 32\]|found a matrix of shape \[32, 112\], wanted columns in multiples of 32 for Q8_0"
    with pytest.raises(ArchitectureError, match=rows):
        run(formats=["safetensors", "gguf"], gguf_types=["Q8_0"])
    assert not list(project.glob("*release*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ["gguf"], "gguf_types": ["F16"]}, r"publish.formats: found \['gguf'\], wanted safetensors among them"),
        ({"formats": ["safetensors", "onnx"]}, "publish.formats: found 'onnx', wanted one of safetensors, gguf"),
        ({"formats": ["safetensors"] * 2}, "publish.formats: found .*, wanted each of them once"),
        ({"gguf_types": ["Q4_K"]}, "publish.gguf_types: found 'Q4_K', wanted one of F32, .*, Q3_K, in which zeros stay exactly zero"),
        ({"formats": ["safetensors", "gguf"], "gguf_types": []}, r"publish.gguf_types: found \[\], wanted at least one type for gguf"),
    ],
)
def test_formats_that_there_are_not_and_types_that_lose_zeros_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        run(**changes)


# Float8.


def evaluate_rounded(delta: str, perplexity: float = 46.0) -> None:
    """What evaluate_float8 leaves."""
    FLOAT8_RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(FLOAT8_RESULTS / "measurements.json", as_rows(measurements("sparse", perplexity)))
    write_json(FLOAT8_RESULTS / "protocol.json", {**read_json(SPARSE_RESULTS / "details/protocol.json"), "delta": delta})


def test_a_release_in_float8_has_its_own_results_on_its_card(project):
    pytest.importorskip("compressed_tensors")
    evaluate_rounded(SparseDelta(SPARSE, Checkpoint(BASE).fingerprint).fingerprint)
    run(dtype="float8")
    assert read_json(RELEASE / "config.json")["quantization_config"]["format"] == "float-quantized"
    assert "| news, perplexity | 45.00 ± 1.00 | 46.00 ± 1.00 |" in (RELEASE / "README.md").read_text()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=RELEASE, check=True)


@pytest.mark.parametrize("dtype", ["base", "float8"])
def test_no_release_names_a_sparsity_format_anywhere_in_its_config(project, dtype):
    if dtype == "float8":
        pytest.importorskip("compressed_tensors")
        evaluate_rounded(SparseDelta(SPARSE, Checkpoint(BASE).fingerprint).fingerprint)
    run(dtype=dtype)
    assert "sparsity_config" not in (RELEASE / "config.json").read_text()
    assert ("quantization_config" in read_json(RELEASE / "config.json")) == (dtype == "float8")


def test_a_release_in_float8_records_how_both_it_and_the_plain_one_were_loaded(project):
    pytest.importorskip("compressed_tensors")
    evaluate_rounded(SparseDelta(SPARSE, Checkpoint(BASE).fingerprint).fingerprint)
    run(dtype="float8")
    recorded = read_json(RELEASE / "provenance.json")["publish"]
    assert recorded["float8"]["loaded"] == recorded["verified"]["loaded"] | {"loading": "whole"}
    run()
    assert "float8" not in read_json(RELEASE / "provenance.json")["publish"]


def test_results_in_float8_that_are_missing_or_of_another_delta_are_refused(project):
    with pytest.raises(ReleaseError, match="results/float8/protocol.json: not found, wanted .*; run python -m stages.evaluate_float8"):
        run(dtype="float8")
    evaluate_rounded("f" * 64)
    with pytest.raises(ReleaseError, match="results/float8/protocol.json: found results of delta f{12}, wanted [0-9a-f]{12}; run"):
        run(dtype="float8")
    assert not list(project.glob("*release*"))


# Packed, and the zeros for machines.


def unpacked(*arguments: str) -> Path:
    """What `python -m stages.release unpack` restores of the release."""
    release_commands(["unpack", str(RELEASE), "--out", "unpacked", *arguments])
    return Path("unpacked")


@pytest.mark.parametrize("masks_only", [False, True])
def test_a_packed_release_unpacks_to_the_shards_of_the_plain_one(project, masks_only):
    run()
    plain = {path.name: path.read_bytes() for path in RELEASE.iterdir()}
    run(packed=True, masks_only=masks_only)
    assert "The shards here are packed without loss" in (RELEASE / "README.md").read_text()
    assert not list(RELEASE.glob("*.safetensors"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=RELEASE, check=True)
    restored = unpacked(*(["--base", str(BASE)] if masks_only else []))
    assert {path.name for path in restored.iterdir()} == set(plain)
    differing = {name for name, content in plain.items() if (restored / name).read_bytes() != content}
    assert differing == {"README.md", "params.yaml", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=restored, check=True)


def test_masks_alone_are_refused_where_kept_weights_changed(project):
    prune_by_hand("method=sparsegpt")
    evaluate("sparse", 45.0)
    with pytest.raises(ReleaseError, match="publish.masks_only: found true, and kept weights of artifacts/sparse that are not the base's"):
        run(packed=True, masks_only=True)
    assert not list(project.glob("*release*"))


def test_masks_alone_that_are_not_packed_are_refused(project):
    with pytest.raises(ConfigError, match="publish.masks_only: found True, wanted false, or publish.packed true as well"):
        run(masks_only=True)


def test_the_release_states_its_zeros(project):
    run()
    delta, zeros = SparseDelta(SPARSE, Checkpoint(BASE).fingerprint), read_zeros(RELEASE)
    assert (zeros.pattern, zeros.comparison_group) == ({"name": "unstructured", "sparsity": 0.5}, "row")
    assert set(zeros.tensors) == set(delta)
    assert zeros.pruned == sum(row["zeros"] for row in delta.matrices) <= zeros.zeros
    assert not {"sparsity_config", "quantization_config", "compression_config"} & set(read_json(RELEASE / "config.json"))
    release_commands(["check", str(RELEASE)])


# Nothing of the machine, and nothing that runs.


def test_text_that_would_be_interpolated_is_refused(project, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "a-secret-value")
    asked = {**EVALUATION, "generations": {"new_tokens": 3, "prompts": ["${oc.env:A_TOKEN}"]}}
    evaluate("dense", 20.0, asked)
    evaluate("sparse", 45.0, asked)
    with pytest.raises(ReleaseError, match=r"evaluation.generations.prompts: found '\$\{' in its text"):
        run()
    assert not list(project.glob("*release*")) + list(project.glob(".release*"))


def test_nothing_of_the_machine_reaches_a_file_of_the_release(project, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "a-secret-value")
    edit(PRUNE_RESULTS / "provenance.json", hidden_states=f"a file of 2 GB in {project}")
    run()
    private = ["a-secret-value", str(project), str(Path.home()) + "/", str(ROOT), platform.node(), *re.findall(".{5,}", getpass.getuser())]
    for path in RELEASE.rglob("*"):
        content = path.read_bytes()
        assert not [text for text in private if text.encode() in content], path.name


def test_no_file_is_in_the_release_that_is_not_under_its_checksum(project):
    run()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=RELEASE, check=True)
    named = [line.split("  ")[1] for line in (RELEASE / "SHA256SUMS").read_text().splitlines()]
    assert sorted(named) == sorted({path.name for path in RELEASE.iterdir()} - {"SHA256SUMS"})
    assert load_file(RELEASE / "model-00001-of-00004.safetensors")


def test_the_same_results_are_published_as_the_same_bytes(project):
    run()
    first = (RELEASE / "SHA256SUMS").read_text()
    run()
    assert (RELEASE / "SHA256SUMS").read_text() == first


def test_the_command_publishes_what_was_recorded_and_not_what_params_yaml_says(project):
    Path("params.yaml").write_text(OmegaConf.to_yaml(composed("pattern.sparsity=0.75", "method=magnitude")))
    environment = {**projects.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [str(projects.commands() / "python"), "-m", "stages.publish"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (params()["pattern"]["sparsity"], params()["method"]["name"]) == (0.5, "wanda")
    edit(CALIBRATION / "provenance.json", windows_sha256="f" * 64)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ReleaseError: artifacts/calibration/provenance.json: found windows with SHA-256 ffffffffffff, wanted" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((RELEASE / "provenance.json").read_text())["recipe"]["pattern"]["sparsity"] == 0.5


# What its licence allows.


def test_a_base_that_may_not_be_changed_is_not_published_unless_told(project):
    edit(BASE / "provenance.json", license="cc-by-nd-4.0")
    with pytest.raises(ReleaseError, match="licence of the base: found 'cc-by-nd-4.0', which forbids changed copies"):
        run()
    assert not RELEASE.exists()
    run(any_license=True)
    assert params()["publish"]["any_license"] is True
