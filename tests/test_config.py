"""Everything in conf/ composes; what is wrong in it is said before anything runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from stages import config
from stages.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = [path for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "text"]
ASKED = {"hub": ["base.repo=a/b", "base.revision=main"], "local": ["base.path=d", "base.name=a/b", "base.license=mit"]}
ASKED["gguf"] = ["base.path=f", "base.name=a/b", "base.license=mit", f"base.sha256='{'0' * 64}'"]


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    OmegaConf.resolve(cfg)
    return cfg


def committed_params() -> str:
    """params.yaml of the last commit: an experiment changes the working copy, and may."""
    run = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else (ROOT / "params.yaml").read_text()


def test_params_yaml_is_the_composed_default():
    assert committed_params() == OmegaConf.to_yaml(composed())


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_of_every_group_is_valid(path):
    asked = ASKED.get(path.stem, []) if path.parent.name == "base" else []
    sections = config.read(composed(f"{path.parent.name}={path.stem}", *asked))
    assert set(sections) == set(config.SECTIONS)


@pytest.mark.parametrize("path", sorted((CONF / "text").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_corpus_is_named_by_a_preset_or_part_of_one(path):
    presets = [p.read_text() for p in (*CONF.glob("calibration/*"), *CONF.glob("evaluation/*"), *CONF.glob("text/*"), CONF / "config.yaml")]
    assert any(re.search(rf"\b{path.stem}\b", text) for text in presets if text != path.read_text())


def test_a_streamed_evaluation_generates_no_text():
    with pytest.raises(ConfigError, match="evaluation.generations.prompts: found .*, wanted none with evaluation.streamed"):
        config.read(composed("evaluation.streamed=true"))


def test_every_experiment_opens_with_the_command_that_runs_it():
    for path in CONF.glob("experiment/*.yaml"):
        assert f"# dvc exp run -S experiment={path.stem}" in path.read_text().splitlines()[:2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pattern.sparsity=1.0"], r"pattern.sparsity: found 1.0, wanted a fraction of zeros in \[0, 1\)"),
        (["pattern.sparsity=-0.1"], r"pattern.sparsity: found -0.1"),
        (["pattern=nm_2_4", "pattern.kept=4"], r"pattern.kept: found 4, wanted N in 1..3, below pattern.group"),
        (["method.score=guess"], "method.score: found 'guess', wanted one of magnitude, wanda"),
        (["method.threshold=column"], "method.threshold: found 'column', wanted one of row, matrix"),
        (["method.update=guess"], "method.update: found 'guess', wanted one of none, sparsegpt"),
        (["pattern.name=guess"], "pattern.name: found 'guess', wanted one of unstructured, nm"),
        (["allocation.name=guess"], "allocation.name: found 'guess', wanted one of uniform"),
        (["base.source=guess"], "base.source: found 'guess', wanted one of wheel, hub, local, gguf"),
        (["base.sha256=abc"], "base.sha256: found 'abc', wanted the SHA-256"),
        (["base=hub"], "base.repo: found None, wanted ORG/NAME"),
        (["base=hub", "base.repo=a/b"], "base.revision: found None, wanted a commit, tag or branch to pin"),
        (["base=gguf", "base.path=f"], "base.sha256: found None"),
        (["text.calibration.c4_pages.source=guess"], "text.calibration.c4_pages.source: found 'guess', wanted one of wheel, hub, local"),
        (["evaluation.tasks=[boolq,guess]"], "evaluation.tasks: found 'guess', wanted one of boolq"),
        (["evaluation.perplexity.corpus=guess"], "evaluation.perplexity.corpus: found 'guess', wanted one of wikipedia"),
        (["calibration.sources.c4_pages.weight=0.5"], "calibration.sources: found 'weights summing to 0.5'"),
        (["calibration.sources.c4_pages.sampler=guess"], "sampler: found 'guess', wanted one of document, packed"),
        (["text.calibration.c4_pages.sha256=abc"], "text.calibration.c4_pages.sha256: found 'abc', wanted the SHA-256"),
        (["~text.evaluation"], r"text: found \['calibration'\], wanted the keys calibration and evaluation"),
        (["prune.device=cudafoo"], "prune.device: found 'cudafoo', wanted auto, cpu or cuda"),
        (["evaluation.rows=1"], "evaluation.rows: found 1, wanted null or at least 2"),
        (["prune.device=tpu"], "prune.device: found 'tpu', wanted auto, cpu or cuda"),
        (
            ["method=sparsegpt", "pattern=nm_4_8", "method.block_size=100"],
            "method.block_size: found 100, wanted a multiple of pattern.group = 8",
        ),
        (["prune.propagate=sparse"], "prune.propagate: found 'sparse', wanted one of pruned, dense"),
        (["prune.expert_tokens=-1"], "prune.expert_tokens: found -1, wanted 0 or more tokens"),
        (["prune.memory_budget=0"], "prune.memory_budget: found 0.0, wanted null or more than 0 GiB"),
        (["method=sparsegpt", "method.damping_limit=0.001"], "method.damping_limit: found 0.001, wanted at least method.damping = 0.01"),
    ],
)
def test_a_bad_value_names_its_key_what_was_found_and_what_is_wanted(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.read(composed(*overrides))


@pytest.mark.parametrize("override", ["pattern.sparsity=abc", "calibration.windows=many", "pattern.sparsty=0.5", "method.damping=1"])
def test_a_wrong_type_or_a_misspelled_key_fails_at_composition_before_anything_is_queued(override):
    with pytest.raises(ConfigCompositionException, match=re.escape(override)):
        composed(override)


@pytest.mark.parametrize(("group", "known"), [("method", "wanda"), ("pattern", "nm_2_4"), ("calibration", "c4"), ("evaluation", "paper")])
def test_an_unknown_option_lists_the_known_ones(group, known):
    with pytest.raises(MissingConfigException, match=rf"Could not find '{group}/guess'(.|\n)*{known}"):
        composed(f"{group}=guess")


def test_a_key_that_only_params_yaml_has_is_refused_too():
    with pytest.raises(ConfigError, match="method: .*damping"):
        config.read(edited("method.damping", 0.1))
    with pytest.raises(ConfigError, match=r"params.yaml: found \"sections \['extra'\]\""):
        config.read(edited("extra", {"a": 1}))


def test_a_corpus_that_nothing_fetches_is_refused():
    with pytest.raises(ConfigError, match="calibration.sources: found 'guess', wanted one of c4_pages"):
        config.read(edited("calibration.sources", {"guess": {"sampler": "packed", "weight": 1.0}}))


def edited(key: str, value: object):
    """params.yaml with one key written by hand, as no composition would have let it."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed()))
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


@pytest.mark.parametrize("stage", ["fetch part=base", "sample", "prune", "evaluate part=dense", "publish"])
def test_every_stage_refuses_any_bad_value_before_it_looks_for_a_weight(stage, tmp_path):
    """There is not even a checkpoint here: the configuration is refused first, in one line, without a traceback."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    command = [sys.executable, "-m", *f"stages.{stage}".split(), "pattern.sparsity=1.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ConfigError: pattern.sparsity: found 1.5, wanted a fraction of zeros in [0, 1)" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
