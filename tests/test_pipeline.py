"""The pipeline as DVC runs it: on a small checkpoint with zephyr's architecture, in a real clone."""

import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from stages.checkpoint.reader import Checkpoint
from stages.files import SPARSE_JOURNAL, sha256
from tests import project as projects
from tests import tiny
from tests.dependencies import code_of
from tests.evaluation import delta as deltas
from tests.project import ROOT, Project

SPEC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ALL = set(SPEC)
RERUN_BY_PRUNING = ["prune", "evaluate_sparse", "evaluate_float8", "publish", "upload"]
EVALUATIONS = ["evaluate_dense", "evaluate_sparse", "evaluate_quantised", "evaluate_float8"]


# What dvc.yaml declares is what the code uses.


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_is_handed_the_parameters_that_dvc_tracks(stage):
    module, *arguments = SPEC[stage]["cmd"].split("-m ")[1].split()
    parameters = importlib.import_module(module).main.parameters
    assert list(parameters[arguments[0].removeprefix("part=") if arguments else ""]) == SPEC[stage]["params"]


# Packages of which a stage runs a part and names the whole: an edit there reruns a stage before it, whose seconds it reads.
WHOLE = {"publish": ("stages/pruning", "stages/evaluation")}
IGNORED = {line.lstrip("/") for line in (ROOT / ".dvcignore").read_text().splitlines() if line.startswith("/stages")}


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_depends_on_the_code_that_it_runs_and_on_no_other(stage):
    declared, more = set(), WHOLE.get(stage, ())
    for path in (ROOT / dep for dep in SPEC[stage]["deps"] if dep.startswith("stages")):
        files = {path} if path.is_file() else set(path.rglob("*.py"))
        declared |= {str(file.relative_to(ROOT)) for file in files} - IGNORED
    code = {str(path.relative_to(ROOT)) for path in code_of(SPEC[stage]["cmd"])}
    assert sorted(name for name in declared - code if not name.startswith(more)) == []
    assert sorted(code - declared) == []


# What an edit reruns.


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project whose default point has been run once."""
    made = projects.make(tmp_path_factory.mktemp("project"))
    ran = made.stages_run("exp", "run", "-n", "first", "-S", "experiment=tiny")
    assert set(ran) == ALL
    assert ran[0] == "fetch_text"  # what is wrong with a text is said before a base is downloaded
    return made


def test_when_nothing_changed_nothing_runs(project):
    assert project.stages_run("repro") == []
    assert project.stages_run("exp", "run", "-S", "experiment=tiny") == []


CHANGED: dict[str, set[str]] = {  # overrides -> the stages that read what they change
    "pattern.sparsity=0.75": {"prune"},
    "method=sparsegpt": {"prune"},
    "prune=one_pass_kept": {"observe", "prune"},
    "evaluation.rows=3": set(EVALUATIONS),
    "publish.name=small": {"publish"},
    "publish.dtype=float8": {"evaluate_float8", "publish"},
    "publish.hub.private=false": {"upload"},
    "ruler.types=[Q3_K]": {"evaluate_quantised"},
}


def test_a_changed_value_is_read_by_the_stages_that_depend_on_it(project):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    params, found = project.root / "params.yaml", {}
    before = params.read_text()
    try:
        for override in CHANGED:
            params.write_text(project.run(sys.executable, "-m", "stages.config.compose", "experiment=tiny", override))
            found[override] = project.changed_stages()
    finally:
        params.write_text(before)
    assert found == CHANGED


@pytest.mark.parametrize(
    ("overrides", "rerun"),
    [
        (["method=sparsegpt"], RERUN_BY_PRUNING),
        (["evaluation.rows=3", "publish.dtype=float8"], [*EVALUATIONS, "publish", "upload"]),
    ],
)
def test_a_changed_value_reruns_what_reads_it_and_what_depends_on_that(project, overrides, rerun):
    arguments = [argument for override in ["experiment=tiny", *overrides] for argument in ("-S", override)]
    assert sorted(project.stages_run("exp", "run", *arguments)) == sorted(rerun)
    assert project.changed_stages() == set()


def test_every_experiment_is_shown_with_the_line_that_runs_it_again(project):
    project.stages_run("exp", "run", "-n", "sparser", "-S", "experiment=tiny", "-S", "pattern.sparsity=0.75")
    shown = project.run(sys.executable, "-m", "stages.show", "--commands")
    header, _, *rows = shown[shown.index("experiment ") :].strip().split("\n")
    assert header.split()[:4] == ["experiment", "method", "pattern", "sparsity"]
    sparser = next(row for row in rows if "0.75" in row)
    metrics = json.loads((project.root / "results/sparse/metrics.json").read_text())
    scores = metrics["corpora"]["tiny_articles"]
    assert f"{scores['perplexity']:.2f} ± {scores['perplexity_stderr']:.2f}" in sparser
    assert f"{scores['mean_kld']:.3f} ± {scores['mean_kld_stderr']:.3f}" in sparser
    line = sparser[sparser.index("dvc exp run") :]
    assert "pattern.sparsity=0.75" in line
    assert project.stages_run(*shlex.split(line)[1:]) == []
    compared = project.run(sys.executable, "-m", "stages.compare")
    override = re.search(r"publish\.frontier=[0-9a-f]{64}", compared)[0]
    assert sorted(project.stages_run(*shlex.split(line)[1:], "-S", override)) == ["publish", "upload"]
    assert "(frontier.png)" in (project.root / "release/README.md").read_text()
    assert "frontiers.json" in (project.root / "release/SHA256SUMS").read_text()
    elsewhere = project.root.parent / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "stages.show"],
        cwd=elsewhere,
        env={**projects.ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.split()[0]) == (1, "error:")


AFFECTED: dict[str, set[str]] = {  # an edited file -> the stages that run again
    "stages/sources/readers.py": {"fetch_text"},
    "stages/sources/base.py": {"fetch_base"},
    "stages/calibration/samplers.py": {"sample"},
    "stages/pruning/scores/wanda.py": {"prune", "publish"},
    "stages/pruning/block_loop.py": {"prune", "publish"},
    "stages/pruning/observer.py": {"observe", "prune", "publish"},
    "stages/evaluation/metrics/perplexity.py": {*EVALUATIONS, "publish"},
    "stages/evaluation/running.py": {*EVALUATIONS, "publish"},
    "stages/comparison/paired.py": {"evaluate_sparse"},
    "stages/quantisation/ggml.py": {"evaluate_quantised", "publish"},
    "stages/release/card.py": {"publish"},
    "stages/release/uploading.py": {"upload"},
    "stages/checkpoint/delta.py": {"prune", "evaluate_sparse", "evaluate_float8", "publish"},
    "stages/config/entry.py": ALL,
    "stages/config/sections.py": set(),
    "stages/config/checks.py": set(),
    "stages/config/compose.py": set(),
    "README.md": set(),
    "conf/method/wanda.yaml": set(),
    "tests/tiny.py": set(),
}


def test_an_edit_of_the_code_reruns_the_stages_that_use_it(project):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    found = {}
    of_an_editor = project.root / "stages/config/.entry.py.swp"
    of_an_editor.write_text("open")
    assert project.changed_stages() == set()
    of_an_editor.unlink()
    for edited in AFFECTED:
        path = project.root / edited
        before = path.read_text()
        try:
            path.write_text(before + "\n# edited\n")
            found[edited] = project.changed_stages()
        finally:
            path.write_text(before)
    assert found == AFFECTED


def test_the_score_of_the_docs_is_one_python_file_and_one_yaml(project):
    """Its name is in no list; what was fetched, drawn and measured of the dense model stays."""
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    document = (ROOT / "docs/extending.md").read_text()
    score, option = project.root / "stages/pruning/scores/mine.py", project.root / "conf/method/score/mine.yaml"
    score.write_text(re.findall(r"```python\n(.*?)```", document, re.S)[0])
    option.write_text(re.findall(r"```yaml\n(.*?)```", document, re.S)[0])
    try:
        project.run("git", "add", "-N", str(score), str(option))
        point = ["exp", "run", "-S", "experiment=tiny", "-S", "method/score=mine"]
        assert sorted(project.stages_run(*point)) == sorted(RERUN_BY_PRUNING)
        recipe = json.loads((project.root / "artifacts/sparse/delta.json").read_text())["recipe"]
        assert (recipe["method"]["score"], recipe["label"]) == ({"name": "mine", "power": 0.5}, "wanda (mine, per row)")
        assert "[Author et al. 2026](https://arxiv.org/abs/2601.00000)" in (project.root / "release/README.md").read_text()
        output = project.run("python", "-m", "stages.prune", "method/score=mine", "method.score.power=-1", fails=True)
        assert "ConfigError: method.score.power: found -1.0, wanted more than 0" in output
    finally:
        project.run("git", "reset", "-q")
        score.unlink()
        option.unlink()


def test_another_version_of_a_library_is_another_result_and_is_not_computed_by_this_one(project):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    project.run("dvc", "exp", "run", "-S", "experiment=tiny", "-S", "environment.lm_eval=9.9.9", fails=True)
    output = project.run("dvc", "repro", fails=True)
    assert "environment.lm_eval: found '0." in output
    assert "wanted 9.9.9" in output
    assert project.stages_run("exp", "run", "-S", "experiment=tiny") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pattern.sparsity=1.5", "pattern.sparsity: found 1.5, wanted a fraction of zeros"),
        (
            "+evaluation.corpora.boolq={window_length:64,windows:4,evenly:false}",
            "evaluation.corpora: found 'boolq', wanted a corpus of rows",
        ),
        ("publish.name=${oc.env:HOME}", "publish.name: found '${oc.env:HOME}', wanted a plain value"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_queued(project, override, message):
    output = project.run("dvc", "exp", "run", "--queue", "-S", "experiment=tiny", "-S", override, fails=True)
    assert message in output
    assert "No experiment tasks in the queue" in project.run("dvc", "queue", "status")


def test_a_text_that_is_none_is_refused_by_the_first_stage(project):
    override = "text.calibration.tiny_pages.text=body"
    output = project.run("dvc", "exp", "run", "-S", "experiment=tiny", "-S", override, fails=True)
    message = (
        'TextError: text.calibration.tiny_pages: tiny_pages.jsonl, line 1: found text, wanted "body" for prose or "messages" for a dialogue'
    )
    assert f"{message}; set text.calibration.tiny_pages.text=text if it holds the prose" in output
    assert re.findall(r"Running stage '([^']+)'", output) == ["fetch_text"]


def test_text_of_ones_own_is_the_two_files_of_the_docs(project, tmp_path):
    """ShareGPT dialogues, as people have them, through the template of the tiny base."""
    source, preset = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/text.md").read_text(), re.S)
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(tiny.sentences(40, seed=12, length=90))]
    path = tiny.write_lines(tmp_path / "chat.jsonl", [{"conversations": turns[i : i + 2]} for i in range(0, 40, 2)])
    named = source.replace("/data/pages.jsonl", str(path)).replace("SHA256-OF-THE-FILE", sha256(path))
    written = {
        project.root / "conf/text/mine.yaml": named,
        project.root / "conf/calibration/mine.yaml": preset,
    }
    for file, content in written.items():
        file.write_text(content)
    try:
        point = ["-S", "experiment=tiny", "-S", "calibration=mine", "-S", "calibration.window_length=64"]
        assert project.stages_run("exp", "run", *point, "sample") == ["fetch_text", "sample"]
    finally:
        for file in written:
            file.unlink()
    recorded = json.loads((project.root / "artifacts/calibration/provenance.json").read_text())["sources"]["mine"]
    assert len(recorded["first_windows"]) == 3
    assert "</s>\n<|assistant|>\n" in recorded["first_windows"][0] + recorded["first_windows"][1]


def test_kept_statistics_are_observed_once_for_all_points_of_a_sweep(project, monkeypatch):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    kept = ["exp", "run", "-S", "experiment=tiny", "-S", "prune=one_pass_kept"]
    assert project.stages_run(*kept, "prune") == ["observe", "prune"]
    assert project.stages_run(*kept, "-S", "method=ria", "prune") == ["prune"]
    assert project.stages_run(*kept, "-S", "pattern.sparsity=0.6", "prune") == ["prune"]
    assert json.loads((project.root / "results/prune/provenance.json").read_text())["kept_statistics"] == "norms"
    monkeypatch.setitem(projects.ENVIRONMENT, projects.HASH_SEED, "7")  # see forked
    from_kept = {path.name: path.read_bytes() for path in (project.root / "artifacts/sparse").iterdir()}
    project.stages_run("exp", "run", "-S", "experiment=tiny", "-S", "prune=one_pass", "-S", "pattern.sparsity=0.6", "prune")
    assert {path.name: path.read_bytes() for path in (project.root / "artifacts/sparse").iterdir()} == from_kept


@pytest.mark.parametrize("streamed", ["true", "false"])
def test_points_that_are_evaluated_side_by_side_have_the_results_that_each_has_alone(project, streamed):
    sparsities, sweep = (0.55, 0.65), project.root.parent / f"together-{streamed}.yaml"
    shared = f"overrides: [experiment=tiny, evaluation.streamed={streamed}]"
    sweep.write_text(f"{shared}\ngrid: {{pattern.sparsity: {list(sparsities)}}}\n")
    said = project.run(sys.executable, "-m", "stages.sweep", str(sweep), "--together")
    assert re.search(r"^2 points evaluated side by side in \d+ s$", said, re.M)
    assert said.count("ran fetch_text") <= 1
    assert len(re.findall(r"/2 together.*: done in .*evaluate_sparse", said)) == 2, said
    for sparsity in sparsities:
        point = ["-S", "experiment=tiny", "-S", f"evaluation.streamed={streamed}", "-S", f"pattern.sparsity={sparsity}"]
        assert project.stages_run("exp", "run", *point, "evaluate_sparse") == []
        results = project.root / "results/sparse"
        together, of_run = _files(results), json.loads((results / "run.json").read_text())
        project.run(sys.executable, "-m", "stages.evaluate", "part=sparse")
        alone = json.loads((results / "run.json").read_text())
        assert _files(results) == together
        assert (of_run["evaluated_together"], alone["evaluated_together"]) == (2, 1)
        assert of_run["seconds"] > 0


def test_a_model_that_cannot_be_scored_stops_no_other_that_is_evaluated_side_by_side(project, tmp_path):
    project.stages_run("exp", "run", "-S", "experiment=tiny", "evaluate_sparse")
    names = ("first", "damaged", "not_finite", "another_evaluation", "second", "missing")
    clones = {name: tmp_path / name for name in names}
    for clone in (clones[name] for name in names[:-1]):
        shutil.copytree(project.root / "artifacts/sparse", clone / "artifacts/sparse")
        shutil.copy(project.root / "params.yaml", clone)
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["evaluation"]["rows"] += 1
    (clones["another_evaluation"] / "params.yaml").write_text(yaml.safe_dump(params))
    next((clones["damaged"] / "artifacts/sparse").glob("*.safetensors")).write_bytes(b"nothing")
    shutil.rmtree(clones["not_finite"] / "artifacts/sparse")
    deltas.write(clones["not_finite"] / "artifacts/sparse", Checkpoint(project.root / "artifacts/base"), 3e38)
    said = project.run(sys.executable, "-m", "stages.evaluate_together", *map(str, clones.values()))
    left_out = dict(re.findall(r"/(\w+): left out: (\w+): ", said))
    assert left_out == {
        "damaged": "CheckpointError",
        "not_finite": "PruningError",
        "another_evaluation": "ConfigError",
        "missing": "ConfigError",
    }
    assert "evaluated 2 sparse models side by side" in said
    for name in ("first", "second"):
        parts = {path.name.split("-")[0] for path in (clones[name] / SPARSE_JOURNAL).iterdir()}
        assert {"windows.safetensors", "answers", "generations", "together"} <= parts
    again = project.run(sys.executable, "-m", "stages.evaluate_together", *map(str, clones.values()))
    assert "evaluating 2 sparse models" in again  # those that are not scored yet


def _files(directory: Path) -> dict[str, bytes]:
    """All but what differs from run to run."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("run.json", "speed.json")
    }


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


def test_metrics_are_finite_numbers_by_corpus_and_task(project):
    metrics = json.loads((project.root / "results/sparse/metrics.json").read_text())
    assert {section: list(names) for section, names in metrics.items()} == {
        "corpora": ["tiny_articles"],
        "tasks": ["boolq", "piqa"],
        "mean": ["tasks"],
        "generations": ["raw", "chat"],
        "size": ["matrices"],
    }
    numbers = [number for names in metrics.values() for values in names.values() for number in values.values()]
    assert all(isinstance(number, float) and math.isfinite(number) for number in numbers)
    assert {"perplexity", "perplexity_stderr", "perplexity_ratio", "dense_perplexity", "mean_kld"} <= set(
        metrics["corpora"]["tiny_articles"]
    )
    prune = json.loads((project.root / "results/prune/metrics.json").read_text())
    assert set(prune) == {"sparsity", "relative_error", "relative_error_held_out", "seconds", "peak_memory_gib"}


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
        sections = json.loads((project.root / "results/sparse/metrics.json").read_text())
        scored = ("corpora", "tasks", "mean")
        return {f"{name} {key}": value for section in scored for name, of in sections[section].items() for key, value in of.items()}

    project.stages_run("exp", "run", "-S", "experiment=tiny")
    whole = metrics()
    streamed = ["-S", "evaluation.streamed=true", "-S", "evaluation.generations.prompts=[]"]
    assert "evaluate_sparse" in project.stages_run("exp", "run", "-S", "experiment=tiny", *streamed)
    assert metrics() == pytest.approx(whole, rel=1e-4, abs=1e-6)
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


def test_several_processes_are_a_parameter_of_the_stage(project):
    two = ["exp", "run", "-S", "experiment=tiny", "-S", "prune.processes=2", "prune"]
    assert project.stages_run(*two) == ["observe", "prune"]
    provenance = json.loads((project.root / "results/prune/provenance.json").read_text())
    assert (provenance["processes"], provenance["prune"]["processes"]) == (2, 2)
    project.stages_run("exp", "run", "-S", "experiment=tiny", "prune")
    assert project.stages_run(*two) == []  # from the cache


def test_what_several_processes_made_is_taken_as_the_stages_result(project):
    project.run("dvc", "exp", "run", "-S", "experiment=tiny", "prune")
    project.run(*["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "stages.prune"])
    assert json.loads((project.root / "results/prune/provenance.json").read_text())["processes"] == 2
    project.run("dvc", "commit", "-f", "prune")
    assert project.stages_run("repro", "prune") == []


# What a team shares.


def test_a_second_clone_computes_nothing_that_the_first_has_shared(project, tmp_path):
    point = ["exp", "run", "-S", "experiment=tiny", "-S", "calibration.seed=7"]
    assert project.stages_run(*point, "-n", "shared") == ["sample", "observe", *RERUN_BY_PRUNING]
    project.run("dvc", "exp", "push", "origin", "shared", "--run-cache")
    other = projects.clone(project, tmp_path / "b")
    assert other.stages_run(*point, "--pull", "--allow-missing") == []
    for path in ("release/README.md", "results/sparse/metrics.json", "results/prune/metrics.json"):
        assert (other.root / path).read_text() == (project.root / path).read_text()
    new = [*point, "-S", "pattern.sparsity=0.25", "--pull", "--allow-missing", "evaluate_sparse"]
    assert other.stages_run(*new) == ["prune", "evaluate_sparse"]


def test_a_fresh_clone_is_clean_after_make_repro_and_never_pulls_what_was_not_pushed(project, tmp_path):
    project.stages_run("exp", "run", "-S", "experiment=tiny")
    clone = projects.clone(project, tmp_path / "fresh")
    assert "Everything is up to date" in clone.run("dvc", "pull", "--allow-missing")
    assert "md5" not in clone.run("dvc", "pull", fails=True)  # it names no file of another machine
    clone.run("dvc", "config", "--local", "cache.dir", str(project.root / ".dvc/cache"))
    (clone.root / "params.yaml").write_text((project.root / "params.yaml").read_text())
    clone.run("git", "commit", "-q", "-a", "-m", "The tiny experiment as the default")
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv/ready").touch()  # the environment of these tests
    assert "Pipeline is up to date" not in clone.run("make", "repro")
    assert clone.run("git", "status", "--porcelain") == ""
    assert (clone.root / "release/README.md").is_file()
    clone.run("make", "repro")
    assert clone.run("git", "status", "--porcelain") == ""
