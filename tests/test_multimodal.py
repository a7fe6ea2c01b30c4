"""A small multimodal checkpoint, from its directory to its release: every stage, as its main runs it."""

import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from stages import evaluate, evaluate_float8, fetch, prune, publish, sample
from stages.calibration.section import Calibration, CalibrationSource
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.config.environment import Environment, installed
from stages.errors import ArchitectureError
from stages.files import BASE, DENSE_RESULTS, RELEASE, SPARSE_RESULTS, read_json, sha256
from stages.release.__main__ import main as release_commands
from stages.release.section import CONTENTS, Publish
from stages.sources.base import LocalBase
from stages.sources.text import LocalText, Text
from tests import multimodal, tiny
from tests.test_evaluate import BOOLQ, EVALUATION, PIQA

KIND, MODEL_CLASS = "mistral3", "Mistral3ForConditionalGeneration"
PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type": "PixtralImageProcessor",  "patch_size": 14}\n',
    "processor_config.json": '{"processor_class": "PixtralProcessor"}',
}
CALIBRATION = Calibration(
    name="tiny",
    windows=6,
    held_out=2,
    window_length=64,
    bos="auto",
    seed=0,
    overlap_tokens=13,
    max_overlap=0,
    max_refused=0.0,
    sources={"pages": CalibrationSource(sampler="document", weight=1.0)},
)


def run_publish(**changes: object) -> None:
    section = Publish(**{**asdict(read()["publish"]), **changes})
    environment = Environment(**{field.name: installed(field.name) for field in fields(Environment)})
    publish.main.function(environment=environment, **{f"publish_{key}": getattr(section, key) for key in CONTENTS})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A directory in which every stage ran."""
    root = tmp_path_factory.mktemp("finished")
    source = multimodal.write(root / "source", KIND, vocab_size=400, max_position_embeddings=512)
    tiny.tokenizer().save_pretrained(source)
    for name, content in PROCESSOR.items():
        (source / name).write_text(content)
    lines = {
        "pages": [{"text": text} for text in tiny.sentences(40, seed=4, length=120)],
        "articles": [{"text": text} for text in tiny.sentences(20, seed=5)],
        "boolq": BOOLQ,
        "piqa": PIQA,
    }
    columns = {"text": "text", "messages": "messages", "role": "role", "content": "content"}
    files = {name: tiny.write_lines(root / f"{name}.jsonl", rows) for name, rows in lines.items()}
    texts = {
        name: LocalText(source="local", path=str(path), sha256=sha256(path), reader="rows", license="cc0-1.0", **columns)
        for name, path in files.items()
    }
    before = Path.cwd()
    os.chdir(root)
    try:
        fetch.fetch_base(LocalBase(source="local", path=str(source), name="tests/vision", fingerprint=None, license="mit"))
        fetch.fetch_text(Text(calibration={"pages": texts.pop("pages")}, evaluation=texts))
        sample.main.function(CALIBRATION)
        sections = read("prune.device=cpu", "method=sparsegpt", "pattern=nm_2_4")
        prune.main.function(**{name: sections[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune")})
        evaluate.main.function(part="dense", evaluation=EVALUATION)
        evaluate.main.function(part="sparse", evaluation=EVALUATION)
        run_publish()
    finally:
        os.chdir(before)
    return root


@pytest.fixture()
def root(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which the test runs."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_the_release_is_of_the_bases_class_with_the_files_of_its_processor(root):
    assert (RELEASE / "config.json").read_bytes() == (root / "source/config.json").read_bytes()
    for name, content in PROCESSOR.items():
        assert (RELEASE / name).read_text() == content
        assert f"{sha256(RELEASE / name)}  {name}\n" in (RELEASE / "SHA256SUMS").read_text()
    model = AutoModelForImageTextToText.from_pretrained(RELEASE, dtype=torch.float32)
    assert type(model).__name__ == MODEL_CLASS
    base, release = Checkpoint(BASE), Checkpoint(RELEASE)
    pruned = {row["tensor"] for row in read_json(Path("results/prune/sparsity.json"))}
    assert len(pruned) == 21
    assert all("language_model" in name and ".layers." in name for name in pruned)
    for name in base:
        same = torch.equal(base.tensor(name), release.tensor(name))
        assert same == (name not in pruned), name


def test_the_card_says_which_part_was_pruned_and_how_it_is_loaded(root):
    card = (RELEASE / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    base = Checkpoint(BASE)
    total = sum(base.tensor(name).numel() for name in base)
    weights = sum(row["weights"] for row in read_json(Path("results/prune/sparsity.json")))
    share = f"{100 * weights / total:.3g}% of all weights of the checkpoint"
    assert f"- In scope: the text decoder of this multimodal model ({MODEL_CLASS}) alone, {share}; calibrated and evaluated on text" in card
    assert "- Parts of other modalities, untouched bit for bit: `model.vision_tower`, `model.multi_modal_projector`.\n" in card
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor\n" in card
    assert 'processor = AutoProcessor.from_pretrained("' in card
    verified = read_json(RELEASE / "provenance.json")["publish"]["verified"]
    assert verified["loaded"]["model_class"] == MODEL_CLASS
    assert verified["share"] == pytest.approx(weights / total)


def test_tasks_and_texts_are_scored_on_the_text_path_whole_or_streamed_alike(root):
    whole = {part: read_json(part / "metrics.json") for part in (DENSE_RESULTS, SPARSE_RESULTS)}
    streamed = replace(EVALUATION, streamed=True)
    evaluate.main.function(part="dense", evaluation=streamed)
    evaluate.main.function(part="sparse", evaluation=streamed)
    for part, metrics in whole.items():
        again = read_json(part / "metrics.json")
        assert again["tasks"] == metrics["tasks"]
        assert again["corpora"] == metrics["corpora"]
    (generated,) = read_json(SPARSE_RESULTS / "details/generations.json")
    assert generated["raw_sparse"]
    model = AutoModelForImageTextToText.from_pretrained(RELEASE, dtype=torch.float32).eval()
    token = read_json(SPARSE_RESULTS / "details/protocol.json")["bos"]
    words = tiny.tokenizer().encode("river stone", add_special_tokens=False)
    prompt = torch.tensor([words if token is None else [tiny.tokenizer().convert_tokens_to_ids(token), *words]])
    made = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert tiny.tokenizer().decode(made[0, prompt.shape[1] :]) == generated["raw_sparse"]


def test_a_packed_release_is_unpacked_to_the_same_bytes(root, tmp_path):
    plain = {path.name: path.read_bytes() for path in RELEASE.glob("*.safetensors")}
    run_publish(packed=True)
    assert {path.name: path.read_bytes() for path in RELEASE.glob("*.safetensors")} != plain
    release_commands(["unpack", str(RELEASE), "--out", str(tmp_path / "unpacked")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "unpacked").glob("*.safetensors")} == plain


def test_gguf_is_refused_by_the_type_before_anything_is_written(root):
    before = (RELEASE / "SHA256SUMS").read_bytes()
    with pytest.raises(ArchitectureError, match=r"publish.formats: found gguf of the architecture mistral3, wanted one of llama"):
        run_publish(formats=["safetensors", "gguf"])
    assert (RELEASE / "SHA256SUMS").read_bytes() == before


def test_a_float8_release_leaves_the_encoder_as_it_was(root):
    evaluate_float8.main.function(publish_dtype="float8", evaluation=EVALUATION)
    run_publish(dtype="float8")  # which stock transformers loads
    config = json.loads((RELEASE / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert any("vision_tower" in name for name in ignored)
    assert not any("language_model.layers" in name for name in ignored)
