import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

from stages import schema
from stages.checkpoint.reader import INDEX, Checkpoint
from stages.errors import CheckpointError, ConfigError, SourceError, SparsesweepError
from stages.files import sha256
from stages.sources import base as checkpoints
from stages.sources import hub as hubs
from stages.sources.base import BASES, GgufBase, HubBase, LocalBase, WheelBase
from stages.sources.wheel import WheelFile
from tests import tiny
from tests.hub_server import COMMIT

REPO = "org/tiny"


def hub(**changes) -> HubBase:
    return HubBase(**{"source": "hub", "repo": REPO, "revision": "main", "license": None, **changes})


def local(path, **changes) -> LocalBase:
    facts = {"source": "local", "path": str(path), "name": "tests/tiny", "fingerprint": None, "license": "mit"}
    return LocalBase(**{**facts, **changes})


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def changed_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DEQUANTISED = {"name": "a/b", "dtype": "float16", "dequantised_by": "x", "license": "mit", "sha256": "0" * 64}
FILE = WheelFile(package="p", version="1", sha256="0" * 64, file="p/x.gguf")
TERMS = dataclasses.replace(FILE, file="p/TERMS.html")
WHEEL = WheelBase(source="wheel", file="x.gguf", size=1, parts=[FILE, FILE], notice="See the terms.", documents=[TERMS], **DEQUANTISED)
GGUF = GgufBase(source="gguf", path="x.gguf", **DEQUANTISED)


def in_part(**changes) -> dict:
    return {"parts": [FILE, dataclasses.replace(FILE, **changes)]}


def in_documents(*files: str) -> dict:
    return {"documents": [dataclasses.replace(FILE, file=file) for file in files]}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (WHEEL, {"sha256": "abc"}, "sha256: found 'abc', wanted the SHA-256 of the GGUF file, 64 hexadecimal digits"),
        (WHEEL, {"file": "p/x.gguf"}, "file: found 'p/x.gguf', wanted the name of the GGUF file"),
        (WHEEL, {"size": 0}, "size: found 0, wanted at least 1 bytes"),
        (WHEEL, {"notice": " "}, "notice: found ' ', wanted null or the notice that the licence wants beside every copy"),
        (WHEEL, {"parts": []}, r"parts: found \[\], wanted at least one file inside a wheel, each with package, version, sha256 and file"),
        (WHEEL, in_part(sha256="abc"), r"parts\[1\].sha256: found 'abc', wanted the SHA-256 of the wheel"),
        (WHEEL, in_part(package="-r x"), r"parts\[1\].package: found '-r x', wanted the name of a package"),
        (WHEEL, in_part(version="new"), r"parts\[1\].version: found 'new', wanted one version of a package"),
        (WHEEL, in_part(file="../x"), r"parts\[1\].file: found '../x', wanted the path of a file inside the wheel"),
        (WHEEL, in_documents("../TERMS"), r"documents\[0\].file: found '../TERMS', wanted the path of a file inside the wheel"),
        (
            WHEEL,
            in_documents("p/config.json"),
            r"documents: found \['config.json', 'NOTICE'\], wanted names like \*LICEN\[CS\]E\*, NOTICE\*",
        ),
        (WHEEL, in_documents("p/TERMS", "q/TERMS"), r"documents: found \['TERMS', 'TERMS', 'NOTICE'\], wanted names .*, each once"),
        (WHEEL, in_documents("p/NOTICE"), r"documents: found \['NOTICE', 'NOTICE'\], wanted .*; NOTICE is that of base.notice"),
        (WHEEL, {"dtype": "int8"}, "dtype: found 'int8', wanted one of bfloat16, float16, float32"),
        (WHEEL, {"name": ""}, "name: found '', wanted the ORG/NAME to put on the model card"),
        (WHEEL, {"license": ""}, "license: found '', wanted the checkpoint's licence"),
        (hub(), {"repo": None}, "repo: found None, wanted ORG/NAME of a repository"),
        (hub(), {"revision": None}, "revision: found None, wanted a commit, tag or branch to pin"),
        (local("d"), {"path": None}, "path: found None, wanted a directory with config.json and safetensors files"),
        (local("d"), {"license": None}, "license: found None, wanted the checkpoint's licence"),
        (local("d"), {"fingerprint": "00"}, "fingerprint: found '00', wanted null or a checkpoint's fingerprint, 64 hexadecimal digits"),
        (GGUF, {"path": None}, "path: found None, wanted a GGUF file"),
        (GGUF, {"sha256": None}, "sha256: found None, wanted the SHA-256 of the file, 64 hexadecimal digits"),
    ],
)
def test_a_bad_section_names_its_key_what_was_found_and_what_is_wanted(section, changes, message):
    with pytest.raises(ConfigError, match=f"^base.{message}"):
        schema.check(dataclasses.replace(section, **changes), "base")


@pytest.mark.parametrize("section", [WHEEL, hub(), local("d"), local("d", fingerprint="0" * 64), GGUF], ids=lambda section: section.source)
def test_a_good_section_is_taken_and_names_its_entry(section):
    schema.check(section, "base")
    assert BASES.of(section).parameters is type(section)


@pytest.fixture()
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture()
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_a_local_checkpoint_keeps_its_bytes_and_gets_a_record(source, canonical):
    provenance = json.loads((canonical / "provenance.json").read_text())
    for path in canonical.glob("*.safetensors"):
        assert path.read_bytes() == (source / path.name).read_bytes()
        assert provenance["files"][path.name] == sha256(path)
    assert provenance["license"] == "mit"
    assert (canonical / "chat_template.jinja").is_file()


def test_provenance_has_the_section_without_private_paths(source, canonical):
    provenance = json.loads((canonical / "provenance.json").read_text())
    assert provenance["section"] == {**dataclasses.asdict(local(source)), "path": None}
    assert str(source) not in (canonical / "provenance.json").read_text()


def test_a_single_file_gets_the_canonical_name_and_an_index(tmp_path, out):
    tiny.write_checkpoint(tmp_path / "one", shard="1GB")
    checkpoints.fetch(local(tmp_path / "one"), out, downloads=tmp_path / "downloads")
    assert (out / "model-00001-of-00001.safetensors").is_file()
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, Checkpoint(out).tensor(name))


def test_a_hub_revision_is_resolved_recorded_and_downloaded_without_pickles(source, hub_repository, tmp_path, out):
    repository = hub_repository(REPO, {**files_of(source), "pytorch_model.bin": b"pickle", "evil.py": b"code", "README.md": b""})
    provenance = checkpoints.fetch(hub(revision="v1"), out, downloads=tmp_path / "downloads")
    assert (provenance["revision"], provenance["name"], provenance["license"]) == (COMMIT, REPO, "mit")
    assert provenance["section"]["revision"] == COMMIT  # the tag may move
    for path in source.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    asked = {name for _, name, _ in repository.requests}
    assert not asked & {"pytorch_model.bin", "evil.py", "README.md"}
    assert not (tmp_path / "downloads").exists()


def gets(repository) -> list[str]:
    return [name for method, name, _ in repository.requests if method == "GET"]


def test_a_broken_download_goes_on_with_the_file_that_broke(source, hub_repository, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    repository = hub_repository(REPO, files_of(source), budget=80_000)
    (tmp_path / "first").mkdir()
    with pytest.raises(SourceError, match="org/tiny, file model-"):
        checkpoints.fetch(hub(), tmp_path / "first", downloads=tmp_path / "downloads")
    broken = gets(repository)[-1]
    finished = set(gets(repository)) - {broken}
    repository.budget = None
    repository.requests.clear()
    (tmp_path / "second").mkdir()
    checkpoints.fetch(hub(), tmp_path / "second", downloads=tmp_path / "downloads")
    assert broken in gets(repository)
    assert not finished & set(gets(repository))
    assert any(name.endswith(".safetensors") for name in finished)
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_a_connection_that_drops_is_taken_up_at_the_byte_where_it_dropped(source, hub_repository, tmp_path, out, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    repository = hub_repository(REPO, files_of(source), break_after=9000)
    checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    resumed = [wanted for _, name, wanted in repository.requests if wanted and name.endswith(".safetensors")]
    assert any(not wanted.startswith("bytes=0-") for wanted in resumed)
    for path in source.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "facts", "changes", "message"),
    [
        ("org/other", {}, {}, "hub model org/tiny: not found"),
        (REPO, {}, {"revision": "v9"}, "org/tiny: found no revision 'v9'"),
        (REPO, {}, {"repo": "no such repository"}, "found 'no such repository', wanted ORG/NAME"),
        (REPO, {"gated": "manual"}, {}, "org/tiny is gated: .* HF_TOKEN"),
        (REPO, {"license": None}, {}, "card states no licence; set base.license"),
        (REPO, {"license": ["mit", "apache-2.0"]}, {}, "card states the licences mit, apache-2.0; set base.license"),
        (REPO, {"license": [1]}, {}, "found the licence .* on its card, wanted a name"),
        (REPO, {"wrong_hashes": True}, {}, "found hash .*, wanted ffff"),
    ],
)
def test_what_is_wrong_with_a_repository_is_said(source, hub_repository, out, tmp_path, name, facts, changes, message):
    hub_repository(name, files_of(source), **facts)
    with pytest.raises(SourceError, match=message):
        checkpoints.fetch(hub(**changes), out, downloads=tmp_path / "downloads")
    assert not any(out.iterdir())


def test_a_licence_in_a_list_is_that_licence(source, hub_repository, tmp_path, out):
    hub_repository(REPO, files_of(source), license=["mit"])
    assert checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")["license"] == "mit"


def test_a_hub_that_does_not_answer_is_said(out, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="hub model org/tiny: the hub does not answer"):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")


def test_a_gated_repository_opens_with_a_token(source, hub_repository, out, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notasecret")
    hub_repository(REPO, files_of(source), gated="manual")
    assert checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")["revision"] == COMMIT
    assert "hf_notasecret" not in (out / "provenance.json").read_text()


def test_a_repository_of_pickles_only_is_refused_before_any_download(source, hub_repository, out, tmp_path):
    files = {name: content for name, content in files_of(source).items() if "safetensors" not in name}
    repository = hub_repository(REPO, {**files, "pytorch_model.bin": b"pickle"})
    with pytest.raises(SourceError, match="weights only as pickles, which are never loaded; wanted safetensors"):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    assert not repository.requests


@pytest.mark.parametrize(("missing", "message"), [("config.json", "found no config.json"), ("safetensors", "found neither")])
def test_a_repository_without_a_model_is_refused_before_any_download(source, hub_repository, out, tmp_path, missing, message):
    repository = hub_repository(REPO, {name: content for name, content in files_of(source).items() if missing not in name})
    with pytest.raises(SourceError, match=f"hub model org/tiny: {message}"):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    assert not repository.requests


def test_a_file_that_is_no_gguf_is_refused(tmp_path, out):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF nothing")
    facts = {**DEQUANTISED, "source": "gguf", "path": str(path), "dequantised_by": checkpoints.dequantisers()}
    with pytest.raises(SourceError, match="x.gguf: not a GGUF file of a model"):
        checkpoints.fetch(GgufBase(**{**facts, "sha256": sha256(path)}), out, downloads=tmp_path / "downloads")


def test_an_index_that_names_no_tensor_is_refused(copy, out, tmp_path):
    (copy / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="found no weight_map"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_a_config_that_is_no_json_is_named(copy, out, tmp_path):
    (copy / "config.json").write_text("{")
    with pytest.raises(SparsesweepError, match="config.json: not JSON"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_a_full_disk_is_noticed_before_any_download(source, hub_repository, out, tmp_path, monkeypatch):
    repository = hub_repository(REPO, files_of(source))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(SparsesweepError, match=r"found 0.00 GB free on its disk, wanted"):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    assert not repository.requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "'BartForCausalLM'.* is an encoder-decoder"),
        ({"model_type": ["mistral"]}, r"model_type \['mistral'\] is unknown to transformers"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification.*wanted MistralForCausalLM"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "wanted a decoder language model"),
        ({"model_type": "homemade", "auto_map": {"AutoModel": "x.Y"}}, "'homemade' is unknown to transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "found weights quantised by 'gptq'"),
        ({"quantization_config": "gptq"}, "found weights quantised by 'gptq'"),
    ],
)
def test_what_is_no_decoder_is_refused(copy, out, tmp_path, changes, message):
    changed_config(copy, **changes)
    with pytest.raises(SourceError, match=message):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")
    assert not any(out.iterdir())


def test_a_truncated_shard_is_named(copy, out, tmp_path):
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: found \d+ bytes that are no whole safetensors file \(.*not fully covered\); is it truncated"
    ):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_a_missing_shard_is_named(copy, out, tmp_path):
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: not found"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_nan_in_a_checkpoint_names_the_tensor(tmp_path, out):
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight in .*: found NaN or infinity"):
        checkpoints.fetch(local(tmp_path / "nan"), out, downloads=tmp_path / "downloads")


def test_another_fingerprint_than_asked_is_refused(copy, out, tmp_path):
    with pytest.raises(SourceError, match="base.fingerprint: found .*, wanted 00"):
        checkpoints.fetch(local(copy, fingerprint="00"), out, downloads=tmp_path / "downloads")


def test_a_gguf_file_of_another_kind_of_model_is_refused_before_its_tensors_are_read(tmp_path, out):
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "t5")
    for key in ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"):
        writer.add_uint32(f"t5.{key}", 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    facts = {**DEQUANTISED, "source": "gguf", "path": str(path), "dequantised_by": checkpoints.dequantisers(), "sha256": sha256(path)}
    with pytest.raises(SourceError, match="x.gguf: .*t5.* is an encoder-decoder, wanted a decoder language model"):
        checkpoints.fetch(GgufBase(**facts), out, tmp_path / "downloads")


def test_a_gguf_file_with_another_hash_is_refused(tmp_path, out):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    facts = {**DEQUANTISED, "source": "gguf", "path": str(tmp_path / "x.gguf"), "dequantised_by": checkpoints.dequantisers()}
    with pytest.raises(SourceError, match="base.sha256: found .*, wanted 00"):
        checkpoints.fetch(GgufBase(**facts), out, downloads=tmp_path / "downloads")


def test_the_index_of_the_fetched_checkpoint_names_every_tensor(canonical):
    index = json.loads((canonical / INDEX).read_text())["weight_map"]
    assert set(index) == set(tiny.model().state_dict())


# What is taken of a repository or directory.


def test_licences_in_a_folder_of_a_repository_are_left_out(source, hub_repository, tmp_path, out):
    inner = {"LICENSES/MIT.txt": b"MIT", "LICENSE/a": b"a", "tokenizer/tokenizer.json": b"{}", "model/model.safetensors": b"x"}
    repository = hub_repository(REPO, {**files_of(source), "LICENSE.md": b"MIT", **inner})
    checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    assert (out / "LICENSE.md").read_bytes() == b"MIT"
    assert not {name for _, name, _ in repository.requests} & set(inner)
    assert all(path.is_file() for path in out.iterdir())


def test_licence_documents_are_taken_and_recorded(copy, out, tmp_path):
    for name in ("LICENSE", "NOTICE.md", "USE_POLICY.md", "GEMMA_TERMS.html", "notes.txt"):
        (copy / name).write_text(name)
    provenance = checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")
    assert provenance["documents"] == ["GEMMA_TERMS.html", "LICENSE", "NOTICE.md", "USE_POLICY.md"]
    assert set(provenance["documents"]) < set(provenance["files"])
    assert not (out / "notes.txt").exists()


def test_a_folder_named_like_a_file_of_a_checkpoint_is_left_out(copy, out, tmp_path):
    for name in ("LICENSE", "LICENSES", "tokenizer_extra.json"):
        (copy / name).mkdir()
        (copy / name / "MIT.txt").write_text("MIT")
    checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")
    assert all(path.is_file() for path in out.iterdir())
    assert not (out / "LICENSE").exists()


@pytest.mark.parametrize(("name", "message"), [("config.json", "found no config.json"), (INDEX, "found neither .* nor")])
def test_a_folder_is_neither_configuration_nor_index(copy, out, tmp_path, name, message):
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(SourceError, match=f"local checkpoint .*: {message}"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_a_snapshot_of_links_gives_files(source, tmp_path, out):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(source, blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    checkpoints.fetch(local(snapshot), out, downloads=tmp_path / "downloads")
    for path in source.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in out.iterdir())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize(("target", "message"), [("nothing", "found no regular file, wanted one"), ("/proc/self/mem", "cannot be read ")])
def test_a_file_that_cannot_be_read_is_named_before_anything_is_copied(copy, out, tmp_path, name, target, message):
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(target)
    with pytest.raises(SourceError, match=f"/{name}: {message}"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")
    assert not any(out.iterdir())


@pytest.mark.parametrize("name", ["nothing", "copy/config.json"])
def test_a_path_without_a_directory_is_named(copy, out, tmp_path, name):
    with pytest.raises(SourceError, match=f"base.path: found no directory .*{name} to read"):
        checkpoints.fetch(local(tmp_path / name), out, downloads=tmp_path / "downloads")


OUTSIDE = [
    "../../x.safetensors",
    "/etc/x.safetensors",
    "inner/x.safetensors",
    "..",
    ".",
    "",
    "model.bin",
    "a\\b.safetensors",
    "a\n.safetensors",
    7,
]


def with_shard(index: bytes, shard: object) -> bytes:
    """The index, its last tensor in another shard."""
    content = json.loads(index)
    content["weight_map"]["model.norm.weight"] = shard
    return json.dumps(content).encode()


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_directorys_index_names_only_files_beside_it(copy, out, tmp_path, shard):
    (copy / INDEX).write_bytes(with_shard((copy / INDEX).read_bytes(), shard))
    with pytest.raises(
        CheckpointError, match=r"index.json: found tensor 'model.norm.weight' in .*, wanted the name of a .safetensors file"
    ):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")
    assert not any(out.iterdir())


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_repositorys_index_names_only_files_beside_it(source, hub_repository, out, tmp_path, shard):
    files = files_of(source)
    repository = hub_repository(REPO, {**files, INDEX: with_shard(files[INDEX], shard), "inner/x.safetensors": b"x"})
    with pytest.raises(
        CheckpointError, match=r"index.json: found tensor 'model.norm.weight' in .*, wanted the name of a .safetensors file"
    ):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")
    assert not any(name.endswith(".safetensors") for _, name, _ in repository.requests)
    assert not any(out.iterdir())


def test_a_shard_that_the_repository_lacks_is_named(source, hub_repository, out, tmp_path):
    files = files_of(source)
    hub_repository(REPO, {**files, INDEX: with_shard(files[INDEX], "other.safetensors")})
    with pytest.raises(SourceError, match="hub model org/tiny: found no file 'other.safetensors'"):
        checkpoints.fetch(hub(), out, downloads=tmp_path / "downloads")


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "data/../../x.json"])
def test_a_file_name_that_leaves_the_repository_is_refused(hub_repository, tmp_path, name):
    hub_repository(REPO, {name: b"{}"})
    repository = hubs.resolve(REPO, "main", "model")
    with pytest.raises(SourceError, match="hub model org/tiny: found the file name '.*x.json', wanted a path inside the repository"):
        hubs.download(repository, [name], tmp_path / "downloads")
    assert not any(tmp_path.iterdir())


def test_a_gated_dataset_is_called_a_dataset(hub_repository):
    hub_repository(f"datasets/{REPO}", {"a.json": b"{}"}, gated="manual")
    with pytest.raises(SourceError, match="hub dataset org/tiny is gated"):
        hubs.resolve(REPO, "main", "dataset")


@pytest.mark.parametrize("base", [WHEEL, GGUF], ids=["wheel", "gguf"])
def test_other_versions_than_those_that_dequantise_are_refused_before_anything_is_read(base, tmp_path):
    with pytest.raises(ConfigError, match="base.dequantised_by: found 'transformers 5.* installed', wanted x: install them, or compose"):
        checkpoints.fetch(base, tmp_path / "out", downloads=tmp_path / "downloads")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**31, "tiny.gguf: found 12 tensors, wanted those of 2147483648 blocks"),
        ("llama.embedding_length", 2**20, "tiny.gguf: found .* weights, wanted the .* of the model that its head describes"),
        ("llama.vocab_size", 2**31, "tiny.gguf: found .* weights, wanted the .* of the model that its head describes"),
    ],
)
def test_a_gguf_file_that_describes_a_larger_model_than_it_holds_is_refused(tmp_path, out, gguf, key, value, message):
    start = gguf.index(key.encode()) + len(key) + 4
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf[:start] + value.to_bytes(4, "little") + gguf[start + 4 :])
    facts = {**DEQUANTISED, "source": "gguf", "path": str(path), "dequantised_by": checkpoints.dequantisers()}
    with pytest.raises(SourceError, match=message):
        checkpoints.fetch(GgufBase(**{**facts, "sha256": sha256(path)}), out, downloads=tmp_path / "downloads")


def test_a_config_with_more_blocks_than_tensors_is_refused(copy, out, tmp_path):
    changed_config(copy, num_hidden_layers=10**9)
    with pytest.raises(SourceError, match="config.json: found 1000000000 blocks, wanted no more than the checkpoint's .* tensors"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


@pytest.mark.parametrize("architectures", [7, [7], {"a": 1}, "MistralForCausalLM"])
def test_architectures_that_are_no_list_of_names_are_refused(copy, out, tmp_path, architectures):
    changed_config(copy, architectures=architectures)
    with pytest.raises(SourceError, match="as architectures in config.json, wanted a list of names"):
        checkpoints.fetch(local(copy), out, downloads=tmp_path / "downloads")


def test_weights_without_a_tokenizer_are_refused_before_they_are_taken(tmp_path, out, hub_repository):
    tiny.model().save_pretrained(tmp_path / "bare")
    message = "found no tokenizer, wanted one of tokenizer.json, tokenizer.model,"
    with pytest.raises(SourceError, match=message):
        checkpoints.fetch(local(tmp_path / "bare"), out, downloads=tmp_path / "downloads")
    repository = hub_repository(REPO, {path.name: path.read_bytes() for path in (tmp_path / "bare").iterdir()})
    with pytest.raises(SourceError, match=message):
        checkpoints.fetch(hub(license="mit"), out, downloads=tmp_path / "downloads")
    assert not any(name.endswith(".safetensors") for _, name, _ in repository.requests)


@pytest.mark.parametrize(
    "name", ["license.txt", "LICENCE", "COPYING", "MODEL_LICENSE", "ACCEPTABLE_USE_POLICY.md", "Terms_of_use.txt", "Notice"]
)
def test_a_licence_comes_along_however_its_file_is_spelled(source, hub_repository, tmp_path, out, name):
    hub_repository(REPO, {**files_of(source), name: b"terms"})
    checkpoints.fetch(hub(license="mit"), out, downloads=tmp_path / "downloads")
    assert (out / name).read_bytes() == b"terms"


def test_a_disk_without_hard_links_is_taken(source, hub_repository, tmp_path, out, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    hub_repository(REPO, files_of(source))
    monkeypatch.setattr(os, "link", refuse)
    checkpoints.fetch(hub(license="mit"), out, downloads=tmp_path / "downloads")
    for name in Checkpoint(source).headers:
        assert (out / name).read_bytes() == (source / name).read_bytes()
