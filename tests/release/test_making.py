"""From a model to its release by one command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stages.config.compose import composed, read
from stages.config.params import CONF
from stages.errors import ConfigError, ReleaseError
from stages.files import BASE, RELEASE, read_json, sha256, write_json
from stages.release import making
from stages.release.making import Order, overrides
from tests import project as projects
from tests.project import ROOT, Project

COMPARED = ("*.safetensors", "*.json", "*.jinja", "params.yaml")  # the card and provenance have the seconds of each run


def order(model: str = "smollm2_135m", **changes: object) -> Order:
    return Order(**{"model": model, "out": Path("out"), "quality": "fast", "sparsity": "0.5", **changes})


# What is asked for becomes choices of conf/.


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["base=smollm2_135m", "experiment=fast", "pattern.sparsity=0.5"]),
        ({"quality": "best"}, ["base=smollm2_135m", "experiment=best_50", "pattern.sparsity=0.5"]),
        ({"quality": "best", "sparsity": "0.62"}, ["base=smollm2_135m", "experiment=best_60", "pattern.sparsity=0.62"]),
        ({"quality": "best", "sparsity": "4:8"}, ["base=smollm2_135m", "experiment=best_4_8"]),
        ({"sparsity": "2:4"}, ["base=smollm2_135m", "experiment=fast", "pattern=nm_2_4"]),
        ({"overrides": ["calibration.seed=3"]}, ["base=smollm2_135m", "experiment=fast", "pattern.sparsity=0.5", "calibration.seed=3"]),
    ],
)
def test_a_quality_and_a_sparsity_are_choices_that_compose(changes, wanted):
    assert overrides(order(**changes)) == wanted
    assert read(*wanted)


def test_a_repository_is_pinned_to_its_commit(hub_repository):
    hub_repository("org/tiny", {"config.json": b"{}"})
    chosen = overrides(order("org/tiny", license="mit"))
    assert chosen[:4] == [
        "base=hub",
        "base.repo='org/tiny'",
        "base.revision=0123456789abcdef0123456789abcdef01234567",
        "base.license='mit'",
    ]


def test_a_directory_with_odd_letters_in_its_name_is_found(tmp_path):
    directory = tmp_path / "it's, a=model"
    directory.mkdir()
    base = read(*overrides(order(str(directory), license="mit", name="org/mine")))["base"]
    assert (base.path, base.name, base.license) == (str(directory), "org/mine", "mit")


def test_a_directory_has_its_whole_name(tmp_path):
    directory = tmp_path / "Llama-3.1-8B"
    directory.mkdir()
    assert read(*overrides(order(str(directory), license="mit")))["base"].name == "Llama-3.1-8B"


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("smollm2_135m", {"license": "mit"}, "--license: found 'mit' for smollm2_135m, a base of conf/base, wanted none"),
        ("org/tiny", {"name": "mine"}, "--name: found 'mine' for org/tiny, a model of a hub, wanted none"),
        (".", {"license": "mit", "revision": "main"}, "--revision: found 'main' for ., a model on this disk, wanted none"),
    ],
)
def test_what_says_nothing_of_a_kind_of_model_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        overrides(order(model, **changes))


def test_make_takes_a_name_from_its_command_line_alone(tmp_path):
    def line(*arguments: str) -> str:
        environment = os.environ | {"NAME": "host", "LICENSE": "theirs", "REVISION": "r7"}
        command = ["make", "--dry-run", "prune", "MODEL=org/tiny", "OUT=out", *arguments]
        return subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True, check=True).stdout

    assert not [word for word in ("host", "theirs", "r7") if word in line()]
    assert "--name 'mine'" in line("NAME=mine")


def test_a_gguf_file_is_pinned_by_its_hash(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    base = read(*overrides(order(str(file), license="mit")))["base"]
    assert (base.source, base.sha256, base.name) == ("gguf", sha256(file), "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nothing"}, "MODEL: found 'nothing', wanted ORG/NAME of a model hub, a directory, a GGUF file, or a base of conf/base"),
        ({"model": "."}, "--license: not given, wanted the licence of \\."),
        ({"sparsity": "half"}, "--sparsity: found 'half', wanted a fraction or one of 2:4, 4:8"),
    ],
)
def test_what_is_no_model_and_no_sparsity_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        overrides(order(**changes))


def test_a_release_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(ConfigError, match="found there already, wanted a path that is free for the release"):
        making.make(order(out=tmp_path))


@pytest.mark.parametrize("license", ["cc-by-nd-4.0", "other"])
def test_a_licence_that_forbids_a_release_is_refused_before_anything_is_fetched(tmp_path, license):
    (tmp_path / "model").mkdir()
    with pytest.raises(ReleaseError, match=f"licence of the base: found '{license}', .*publish.any_license=true"):
        making.make(order(str(tmp_path / "model"), license=license, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("any_license", [False, True])
def test_a_licence_that_the_base_states_is_read_before_anything_is_computed(tmp_path, hub_repository, monkeypatch, any_license):
    ran = []

    def run(directory: Path, command: making.Command, _: str) -> None:
        ran.append(command.stage)
        (directory / BASE).mkdir(parents=True, exist_ok=True)
        (directory / RELEASE).mkdir(exist_ok=True)
        write_json(directory / BASE / "provenance.json", {"license": "cc-by-nd-4.0"})

    monkeypatch.setattr(making, "_run", run)
    monkeypatch.setattr(making, "_summary", lambda _: "")
    hub_repository("org/tiny", {"config.json": b"{}"})
    wanted = order("org/tiny", out=tmp_path / "out", overrides=[f"publish.any_license={any_license}".lower()])
    if any_license:
        making.make(wanted)
        assert {"prune", "publish"} <= set(ran)
    else:
        with pytest.raises(ReleaseError, match="found 'cc-by-nd-4.0', which forbids changed copies"):
            making.make(wanted)
        assert ran[-1] == "fetch_base" and all(name.startswith("fetch") for name in ran)


def test_the_costs_on_the_page_are_those_of_the_readme():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/publish.md").read_text()
    heading = next(line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| method | pattern |"))
    columns = [heading.index(name) for name in ("perplexity", "seconds")]
    for command, quality in (("dvc exp run -S prune=one_pass", "fast"), ("dvc exp run -S experiment=best_50", "best")):
        (row,) = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.endswith(f"| `{command}` |")]
        (own,) = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| `{quality}` |")]
        assert own[2:] == [row[column] for column in columns]
    assert re.search(r"^\| dense \| +\| 0 \| (\S+) ", readme, re.M)[1] in page


# What comes of it.


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A clone with small corpora, in which the pipeline has run with the choices of the tests below."""
    made = projects.make(tmp_path_factory.mktemp("making"))
    chosen = ["experiment=tiny", "prune=one_pass", "pattern.sparsity=0.25"]
    made.run("dvc", "exp", "run", *(word for choice in chosen for word in ("-S", choice)), "publish")
    return made


def make(project: Project, out: Path, *more: str, fails: bool = False) -> str:
    command = [
        "-m",
        "stages.make_release",
        "tiny",
        str(out),
        "--sparsity",
        "0.25",
        "-S",
        "calibration=tiny",
        "-S",
        "evaluation=tiny",
        *more,
    ]
    return project.run(sys.executable, *command, fails=fails)


def test_the_release_is_that_of_the_pipeline_byte_for_byte(project, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(projects.ENVIRONMENT, projects.HASH_SEED, "7")  # processes of their own, with sets in another order
    said = make(project, out)
    theirs = project.root / "release"
    assert {path.name for path in out.iterdir()} == {path.name for path in theirs.iterdir()}
    names = {path.name for pattern in COMPARED for path in theirs.glob(pattern)} - {"provenance.json"}
    assert len(names) > 5
    for name in names:
        assert (out / name).read_bytes() == (theirs / name).read_bytes(), name
    assert re.search(r"^sparsity +0\.25\d*$", said, re.M)
    assert re.search(r"^perplexity on tiny_articles, dense +\d+\.\d\d ± \d+\.\d\d$", said, re.M)
    assert re.search(r"^perplexity on tiny_articles, sparse +\d+\.\d\d ± \d+\.\d\d$", said, re.M)
    assert re.search(r"^pruning +\d+ s, peak memory", said, re.M)
    assert f"{out}: the release, after" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "found there already" in make(project, out, fails=True)


def test_a_stage_that_fails_leaves_no_release_and_the_same_command_goes_on(project, tmp_path):
    out, checkpoint = tmp_path / "out", project.root.parent / "data/checkpoint"
    hidden = checkpoint.rename(checkpoint.with_name("hidden"))
    said = make(project, out, fails=True)
    assert "failed, and nothing is at the place of the release; the same command goes on from here" in said
    assert not out.exists()
    hidden.rename(checkpoint)
    said = make(project, out, "-S", "publish.name=org/other")
    assert "(done before)" in said  # what depends on no choice that has changed
    assert (out / "SHA256SUMS").is_file()
    assert "name: org/other" in (out / "params.yaml").read_text()


def test_what_depends_on_a_changed_choice_or_file_runs_again_and_no_more(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def made(*more: str) -> dict[str, str]:
        sections = OmegaConf.to_container(composed(*overrides(order(str(model), license="mit", overrides=list(more)))))
        return {command.stage: command.key for command in making._commands(sections)}

    def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
        return {stage for stage in first if first[stage] != second[stage]}

    before = made()
    assert changed(before, made()) == set()
    assert changed(before, made("publish.formats=[safetensors,gguf]")) == {"publish"}
    assert "evaluate_sparse" in changed(before, made("method=sparsegpt"))
    assert not {"fetch_base", "evaluate_dense"} & changed(before, made("method=sparsegpt"))
    (model / "config.json").write_text('{"rope_theta": 2}')
    assert {"fetch_base", "prune", "publish"} <= changed(before, made())
    assert not {"fetch_text", "fetch_tasks"} & changed(before, made())


def test_the_outputs_of_a_stage_are_removed_before_it_runs_with_other_choices(tmp_path):
    lines = "import sys; from pathlib import Path; there = Path('made').exists(); Path('made').mkdir(); sys.exit(there)"
    for key in ("one", "one", "another"):
        command = making.Command(stage="x", description="", words=[sys.executable, "-c", lines], outputs=("made",), key=key)
        making._run(tmp_path, command, "")
    assert read_json(tmp_path / making.ENDED) == {"x": "another"}


def test_a_file_of_ones_own_is_where_dvc_looks_for_it():
    texts = {"a": {"path": "data/a.jsonl"}, "b": {"path": "/b"}, "c": {}, "d": {"path": "~/d"}}
    sections = {"base": {"path": "models/mine"}, "text": {"evaluation": texts}}
    making._make_absolute(sections)
    assert sections["base"]["path"] == str(ROOT / "models/mine")
    wanted = {"a": str(ROOT / "data/a.jsonl"), "b": "/b", "d": str(Path.home() / "d")}
    assert {name: source["path"] for name, source in texts.items() if source} == wanted


def test_an_interrupted_run_goes_on_with_its_commit(tmp_path, hub_repository, monkeypatch):
    hub_repository("org/tiny", {"config.json": b"{}"})
    wanted = order("org/tiny", license="mit", out=tmp_path / "out")
    making.run_of(wanted).mkdir()
    commit = "f" * 40
    (making.run_of(wanted) / "params.yaml").write_text(f"base: {{source: hub, repo: org/tiny, revision: {commit}}}")
    assert f"base.revision={commit}" in overrides(wanted)
    assert f"base.revision={commit}" not in overrides(order("org/tiny", license="mit", out=tmp_path / "other"))


def test_the_project_is_left_as_it_was(project):
    assert project.run("git", "status", "--porcelain", "--", "params.yaml", "dvc.yaml").split() == ["M", "params.yaml"]  # by dvc exp run
