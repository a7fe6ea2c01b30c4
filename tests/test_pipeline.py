"""The pipeline as DVC runs it: on a small checkpoint with zephyr's architecture, in a real clone."""

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from stages.checkpoint.reader import Checkpoint
from tests import project as projects
from tests.project import ROOT, Project

SPEC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RERUN_BY_PRUNING = ["prune", "evaluate_sparse", "publish"]


def module_of(stage: str) -> str:
    return SPEC[stage]["cmd"].split("-m ")[1].split()[0]


# What dvc.yaml declares is what the code uses.


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_is_handed_the_sections_that_dvc_tracks(stage):
    sections = importlib.import_module(module_of(stage)).main.sections
    for part, names in sections.items():
        declared = [name.replace("${item.part}", part) for name in SPEC[stage]["params"]]
        if not part or part in stage or "matrix" in SPEC[stage]:
            assert list(names) == declared


def imported(module: Path) -> set[Path]:
    """Files under stages/ that a module imports, by its syntax tree."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {ROOT / (name.replace(".", "/") + ".py") for name in names if name.split(".")[0] == "stages"}
    return {file for file in files if file.is_file()}


def closure(module: Path) -> set[Path]:
    found, todo = set(), [module]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imported(file)
    return found


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_depends_on_the_code_that_it_imports_and_on_no_other(stage):
    used = closure(ROOT / (module_of(stage).replace(".", "/") + ".py")) | {ROOT / "stages/__init__.py"}
    declared = set()
    for dep in SPEC[stage]["deps"]:
        if dep.startswith("stages"):
            path = ROOT / dep
            declared |= {path} if path.is_file() else {file for file in path.rglob("*.py") if file.name != "__init__.py"}
    assert declared == used


def test_mathematics_imports_torch_and_nothing_of_the_world():
    rooms = ["scores", "updates", "patterns.py", "statistics.py", "allocation.py", "permutations.py"]
    files = [
        file
        for room in rooms
        for file in ([ROOT / "stages/pruning" / room] if room.endswith("py") else (ROOT / "stages/pruning" / room).glob("*.py"))
    ]
    allowed = {"torch", "bisect", "collections.abc", "dataclasses", "fractions", "itertools", "math", "typing"}
    allowed.add("stages.pruning.patterns")  # mathematics, too
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            )
            assert set(modules) <= allowed, file


# What an edit reruns.


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project whose default point has been run once."""
    made = projects.make(tmp_path_factory.mktemp("project"))
    first = made.stages_run("exp", "run", "-n", "first", "-S", "experiment=tiny")
    assert first == ["fetch@base", "fetch@text", "sample", "prune", "evaluate_dense", "evaluate_sparse", "publish"] or sorted(
        first
    ) == sorted(["fetch@base", "fetch@text", "sample", "prune", "evaluate_dense", "evaluate_sparse", "publish"])
    return made


def test_when_nothing_changed_nothing_runs(project):
    assert project.stages_run("repro") == []
    assert project.stages_run("exp", "run", "-S", "experiment=tiny") == []


@pytest.mark.parametrize(
    ("overrides", "rerun"),
    [
        (["pattern.sparsity=0.75"], RERUN_BY_PRUNING),
        (["method=sparsegpt"], RERUN_BY_PRUNING),
        (["evaluation.rows=3"], ["evaluate_dense", "evaluate_sparse", "publish"]),
        (["publish.watts=10.0"], ["publish"]),
    ],
)
def test_a_changed_value_reruns_what_reads_it(project, overrides, rerun):
    arguments = [argument for override in ["experiment=tiny", *overrides] for argument in ("-S", override)]
    assert sorted(project.stages_run("exp", "run", *arguments)) == sorted(rerun)
    assert project.stages_run("exp", "run", *arguments) == []


@pytest.mark.parametrize(
    ("edited", "affected"),
    [
        ("stages/sources/readers.py", {"fetch@base", "fetch@text"}),
        ("stages/calibration/samplers.py", {"sample"}),
        ("stages/pruning/scores/wanda.py", {"prune"}),
        ("stages/pruning/block_loop.py", {"prune"}),
        ("stages/evaluation/perplexity.py", {"evaluate_dense", "evaluate_sparse"}),
        ("stages/release/card.py", {"publish"}),
        ("stages/checkpoint/delta.py", {"prune", "evaluate_dense", "evaluate_sparse", "publish"}),
        ("stages/config.py", {"fetch@base", "fetch@text", "sample", "prune", "evaluate_dense", "evaluate_sparse", "publish"}),
        ("README.md", set()),
        ("conf/method/wanda.yaml", set()),
        ("tests/tiny.py", set()),
    ],
)
def test_an_edit_of_the_code_reruns_the_stages_that_use_it(project, edited, affected):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    path = project.root / edited
    before = path.read_text()
    try:
        path.write_text(before + "\n# edited\n")
        assert project.changed_stages() == affected
    finally:
        path.write_text(before)


# What comes out.


def test_the_release_is_a_plain_checkpoint_that_is_as_sparse_as_asked(project):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    release, base = project.root / "release", Checkpoint(project.root / "artifacts/base")
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        before = base.tensor(name)
        if ".layers." in name and tensor.dim() == 2:
            assert ((tensor == 0).sum(dim=1) == tensor.shape[1] // 2).all(), name
            assert torch.equal(tensor[tensor != 0], before[tensor != 0])
        else:
            assert torch.equal(tensor, before), name
    assert json.loads((release / "config.json").read_text()) == json.loads((base.directory / "config.json").read_text())
    assert {path.name for path in release.glob("*.safetensors")} == {path.name for path in base.directory.glob("*.safetensors")}
    sums = dict(reversed(line.split("  ")) for line in (release / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in release.iterdir()} - {"SHA256SUMS"}


def test_metrics_are_flat_and_finite(project):
    metrics = json.loads((project.root / "results/sparse/metrics.json").read_text())
    assert all(isinstance(value, float) for value in metrics.values())
    assert {"perplexity", "perplexity_stderr", "perplexity_ratio", "accuracy_mean", "boolq", "boolq_stderr"} <= set(metrics)
    prune = json.loads((project.root / "results/prune/metrics.json").read_text())
    assert set(prune) == {"sparsity", "relative_error", "seconds", "peak_memory_gib"}


def test_the_windows_name_their_documents(project):
    provenance = json.loads((project.root / "artifacts/calibration/provenance.json").read_text())
    windows = provenance["sources"]["tiny_pages"]["windows"]
    assert len(windows) == 6
    assert all(count == 64 for spans in windows for _, _, count in spans)


def test_no_path_of_the_machine_reaches_the_release(project):
    for path in (project.root / "release").glob("*.[jmy]*"):
        assert str(project.root.parent) not in path.read_text(), path.name


def test_a_streamed_evaluation_scores_the_same_and_is_published_without_generations(project):
    def metrics() -> dict[str, float]:
        return json.loads((project.root / "results/sparse/metrics.json").read_text())

    project.stages_run("exp", "run", "-S", "experiment=tiny")
    whole = metrics()
    streamed = ["-S", "evaluation.streamed=true", "-S", "evaluation.generations.prompts=[]"]
    assert "evaluate_sparse" in project.stages_run("exp", "run", "-S", "experiment=tiny", *streamed)
    assert metrics() == pytest.approx(whole, rel=1e-4)
    assert "(not generated in this evaluation)" in (project.root / "release/README.md").read_text()


def test_repro_goes_on_after_a_kill(project):
    """The journal lasts some milliseconds here, so that a kill may come too late: then another point is tried."""
    for seed in range(20, 25):
        point = ["exp", "run", "-S", "experiment=tiny", "-S", f"calibration.seed={seed}"]
        if (
            project.killed_once("artifacts/.prune/block-00000.json", "dvc", *point, "prune")
            and (project.root / "artifacts/.prune").exists()
        ):
            break
    assert project.stages_run("repro", "prune") == ["prune"]
    provenance = json.loads((project.root / "results/prune/provenance.json").read_text())
    assert provenance["resumed_after"] >= 1
    assert not (project.root / "artifacts/.prune").exists()


def test_what_several_processes_made_is_taken_as_the_stages_result(project):
    project.run("dvc", "exp", "run", "-S", "experiment=tiny", "prune")
    project.run(*["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "stages.prune"])
    assert json.loads((project.root / "results/prune/provenance.json").read_text())["processes"] == 2
    project.run("dvc", "commit", "-f", "prune")
    assert project.stages_run("repro", "prune") == []


# What a team shares.


def test_a_second_clone_computes_nothing_that_the_first_has_shared(project, tmp_path):
    point = ["exp", "run", "-S", "experiment=tiny", "-S", "calibration.seed=7"]
    assert project.stages_run(*point, "-n", "shared") == ["sample", "prune", "evaluate_sparse", "publish"]
    project.run("dvc", "exp", "push", "origin", "shared", "--run-cache")
    other = projects.clone(project, tmp_path / "b")
    assert other.stages_run(*point, "--pull", "--allow-missing") == []
    for path in ("release/README.md", "results/sparse/metrics.json", "results/prune/metrics.json"):
        assert (other.root / path).read_text() == (project.root / path).read_text()
    new = [*point, "-S", "pattern.sparsity=0.25", "--pull", "--allow-missing", "evaluate_sparse"]
    assert other.stages_run(*new) == ["prune", "evaluate_sparse"]
