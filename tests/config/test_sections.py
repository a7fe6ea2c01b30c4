"""Everything in conf/ composes; what is wrong in it is said when it is composed, before anything is queued or downloaded."""

import re
import subprocess

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from stages.config import sections
from stages.config.compose import composed, read
from stages.config.params import CONF
from stages.errors import ConfigError
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.patterns import PATTERNS
from stages.pruning.scores import SCORES
from stages.pruning.updates import UPDATES
from tests import project as projects

ROOT = CONF.parent
GROUPS = [path for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "text"]
PARTS = sorted(CONF.glob("method/*/*.yaml"))
ASKED = {
    "base=hub": ["base.repo=a/b", "base.revision=main"],
    "base=local": ["base.path=d", "base.name=a/b", "base.license=mit"],
    "base=gguf": ["base.path=f", "base.name=a/b", "base.license=mit", f"base.sha256='{'0' * 64}'"],
}


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_of_every_group_is_valid(path):
    option = f"{path.parent.name}={path.stem}"
    assert set(read(option, *ASKED.get(option, []))) == set(sections.SECTIONS)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_part_of_a_method_is_valid(path):
    method = read(f"method/{path.parent.name}={path.stem}", "method.comparison_group=matrix")["method"]
    part = getattr(method, path.parent.name)
    assert getattr(part, "name", path.stem) == path.stem


@pytest.mark.parametrize("path", sorted((CONF / "text").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_corpus_is_named_by_a_preset_or_part_of_one(path):
    files = [*CONF.glob("calibration/*.yaml"), *CONF.glob("evaluation/*.yaml"), *CONF.glob("text/*"), CONF / "config.yaml"]
    presets = [file.read_text() for file in files]
    assert any(re.search(rf"\b{path.stem}\b", text) for text in presets if text != path.read_text())


def test_every_experiment_opens_with_the_command_that_runs_it():
    for path in CONF.glob("experiment/*.yaml"):
        assert f"# dvc exp run -S experiment={path.stem}" in path.read_text().splitlines()[:2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pattern.sparsity=1.0"], r"pattern.sparsity: found 1.0, wanted a fraction of zeros in \[0, 1\)"),
        (["pattern.sparsity=-0.1"], r"pattern.sparsity: found -0.1"),
        (["pattern=nm_2_4", "pattern.kept=4"], r"pattern.kept: found 4, wanted N in 1..3, below pattern.group"),
        (["method.score.name=guess"], "method.score.name: found 'guess', wanted one of " + ", ".join(SCORES)),
        (["prune.processes=0"], "prune.processes: found 0, wanted at least 1 process"),
        (["prune.processes=33"], "prune.processes: found 33, wanted at most one for each calibration window"),
        (["method.comparison_group=column"], "method.comparison_group: found 'column', wanted one of row, matrix"),
        (["method.update.name=guess"], "method.update.name: found 'guess', wanted one of " + ", ".join(UPDATES)),
        (["pattern.name=guess"], "pattern.name: found 'guess', wanted one of " + ", ".join(PATTERNS)),
        (["allocation.name=guess"], "allocation.name: found 'guess', wanted one of " + ", ".join(ALLOCATIONS)),
        (["base.source=guess"], "base.source: found 'guess', wanted one of wheel, hub, local, gguf"),
        (["base.sha256=abc"], "base.sha256: found 'abc', wanted the SHA-256"),
        (["base=gemma3_270m", "base.parts=[]"], r"base.parts: found \[\], wanted at least one file inside a wheel"),
        (["base=hub"], "base.repo: found None, wanted ORG/NAME"),
        (["base=hub", "base.repo=a/b"], "base.revision: found None, wanted a commit, tag or branch to pin"),
        (["base=gguf", "base.path=f"], "base.sha256: found None"),
        (["text.calibration.c4_pages.source=guess"], "text.calibration.c4_pages.source: found 'guess', wanted one of wheel, hub, local"),
        (["evaluation.styles=[raw,loud]"], "evaluation.styles: found 'loud', wanted one of raw, chat, system, few_shot"),
        (
            ["+evaluation.corpora.guess={window_length:64,windows:4,evenly:false}"],
            "evaluation.corpora: found 'guess', wanted one of wikipedia",
        ),
        (["calibration.sources.c4_pages.weight=0.5"], "calibration.sources: found 'weights summing to 0.5'"),
        (["calibration.sources.c4_pages.sampler=guess"], "sampler: found 'guess', wanted one of document, packed"),
        (["text.calibration.c4_pages.sha256=abc"], "text.calibration.c4_pages.sha256: found 'abc', wanted the SHA-256"),
        (["~text.evaluation"], "text: Structured config of type `Text` has missing mandatory value: evaluation"),
        (
            ["+text.calibration.mine={source: local, path: a.jsonl, sha256: abc, reader: rows, license: mit}"],
            "text.calibration.mine: .* missing mandatory value: text .*; wanted text, .*role, .* conf/text have them",
        ),
        (["prune.device=cudafoo"], "prune.device: found 'cudafoo', wanted auto, cpu or cuda"),
        (["evaluation.rows=0"], "evaluation.rows: found 0, wanted null or at least 1"),
        (["prune.device=tpu"], "prune.device: found 'tpu', wanted auto, cpu or cuda"),
        (
            ["method=sparsegpt", "pattern=nm_4_8", "method.update.block_size=100"],
            "method.update.block_size: found 100, wanted a multiple of pattern.group = 8",
        ),
        (["prune.propagate=sparse"], "prune.propagate: found 'sparse', wanted one of pruned, dense, sequential"),
        (
            ["reconstruction=distilled", "prune=one_pass"],
            "reconstruction.name: found 'distilled', wanted none with prune.propagate = dense",
        ),
        (["reconstruction=distilled", "reconstruction.share=0"], r"reconstruction.share: found 0.0, wanted a share in \(0, 1\]"),
        (["reconstruction=distilled", "reconstruction.epochs=0"], "reconstruction.epochs: found 0.0, wanted more than 0"),
        (["reconstruction=distilled", "reconstruction.learning_rate=0"], "reconstruction.learning_rate: found 0.0, wanted more than 0"),
        (["reconstruction=distilled", "reconstruction.block_epochs=-1"], "reconstruction.block_epochs: found -1, wanted 0 or more"),
        (
            ["reconstruction=distilled", "reconstruction.block_learning_rate=0"],
            "reconstruction.block_learning_rate: found 0.0, wanted more than 0",
        ),
        (["prune.expert_tokens=-1"], "prune.expert_tokens: found -1, wanted 0 or more tokens"),
        (["prune.memory_budget=0"], "prune.memory_budget: found 0.0, wanted null or more than 0 GiB"),
        *(
            (
                [*choice, "calibration.held_out=0"],
                f"calibration.held_out: found 0, wanted at least 1 with {judged}: windows held out judge it",
            )
            for choice, judged in (
                (["reconstruction=block"], "reconstruction.name = block"),
                (["allocation=loss"], "allocation.name = loss"),
                (["method=swaps"], "method.update.name = swaps"),
                (["method=sparsegpt", "method.damping.shrinkage=true"], "method.damping.shrinkage = true"),
            )
        ),
        (["method.damping.limit=0.001"], "method.damping.limit: found 0.001, wanted at least method.damping.share = 0.01"),
    ],
)
def test_a_bad_value_names_its_key_what_was_found_and_what_is_wanted(overrides, message):
    with pytest.raises(InterpolationResolutionError, match=message):
        read(*overrides)


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("score=ria", "score.power", -0.5, "0 or more"),
        ("update=sparsegpt", "update.block_size", 0, "at least 1 column"),
        ("update=least_squares", "update.steps", 0, "at least 1"),
        ("update=admm", "update.steps", 0, "at least 1"),
        ("update=admm", "update.penalty", 0.0, "more than 0"),
        ("update=admm", "update.growth", 0.9, "at least 1"),
        ("update=admm", "update.hold", 0, "at least 1"),
        ("update=admm", "update.refit_steps", -1, "0 or more"),
        ("update=swaps", "update.cycles", 0, "at least 1"),
        ("update=swaps", "update.candidates", 0, "at least 1"),
        ("update=swaps", "update.refit_steps", -1, "0 or more"),
        ("update=dsnot", "update.cycles", 0, "at least 1"),
        ("update=dsnot", "update.threshold", -0.1, "0 or more"),
        ("damping=published", "damping.share", 0.0, "more than 0"),
        ("damping=published", "damping.limit", 0.001, "at least method.damping.share = 0.01"),
    ],
)
def test_every_parameter_of_a_method_has_its_range(part, key, value, wanted):
    with pytest.raises(InterpolationResolutionError, match=rf"method.{key}: found {value}, wanted {wanted}"):
        read(f"method/{part}", f"method.{key}={value}")


@pytest.mark.parametrize(
    ("allocation", "key", "value", "wanted"),
    [
        ("owl", "multiple", 0.0, "more than 0"),
        ("owl", "strength", 1.0, r"a number in \[0, 1\)"),
        ("alphapruning", "strength", -0.1, r"a number in \[0, 1\)"),
        ("loss", "windows", 0, "at least 1"),
    ],
)
def test_every_parameter_of_an_allocation_has_its_range(allocation, key, value, wanted):
    with pytest.raises(InterpolationResolutionError, match=rf"allocation.{key}: found {value}, wanted {wanted}"):
        read(f"allocation={allocation}", f"allocation.{key}={value}")


@pytest.mark.parametrize("allocation", ["owl", "alphapruning", "loss"])
@pytest.mark.parametrize(("lowest", "highest"), [(-0.1, 0.9), (0.6, 0.5), (0.0, 1.1)])
def test_the_bounds_of_every_allocation_are_fractions_in_order(allocation, lowest, highest):
    bounds = [f"allocation.lowest={lowest}", f"allocation.highest={highest}"]
    with pytest.raises(InterpolationResolutionError, match=r"allocation.lowest, highest: found .*, wanted 0 <= lowest <= highest <= 1"):
        read(f"allocation={allocation}", *bounds)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pattern=nm_2_4", "allocation=owl"], "allocation.name: found 'owl', wanted uniform: with pattern.name = nm every matrix is 2:4"),
        (
            ["method=wanda_variant", "method.comparison_group=row"],
            "method.comparison_group: found 'row', wanted matrix with method.score.name = wanda_variant",
        ),
        (
            ["method=dsnot", "method/score=obs"],
            "method.score.name: found 'obs', wanted a score that needs no Gram statistic with method.update.name = dsnot",
        ),
        (["allocation=loss", "pattern.sparsity=0.97"], "pattern.sparsity: found 0.97, wanted between allocation.lowest = 0 and"),
        (["allocation=loss", "allocation.windows=33"], "allocation.windows: found 33, wanted at most calibration.windows = 32"),
        (["method=admm", "method/score=ria"], "method.score.name: found 'ria', wanted wanda with method.update.name = admm"),
        (["allocation=loss", "allocation.row_strength=2"], r"allocation.row_strength: found 2.0, wanted a number in \[0, 1\]"),
        (["allocation=loss", "allocation.gradient_weights=[0.5,2]"], r"allocation.gradient_weights: found \[0.5, 2.0\], wanted at"),
        (["allocation=loss", "allocation.gradient_weights=[0.5,0.5]"], r"allocation.gradient_weights: found \[0.5, 0.5\], wanted at"),
        (["allocation=loss", "allocation.gradient_weights=[]"], r"allocation.gradient_weights: found \[\], wanted at least one"),
        (["allocation=loss", "allocation.row_floor=0"], r"allocation.row_floor: found 0.0, wanted a number in \(0, 1\]"),
    ],
)
def test_a_method_that_does_not_fit_its_pattern_or_allocation_is_refused(overrides, message):
    with pytest.raises(InterpolationResolutionError, match=message):
        read(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=wanda_variant", "method.comparison_group=row", "pattern=nm_2_4"],  # groups compete, whatever the comparison_group
        ["method=sparsegpt", "method.update.block_size=100"],
        ["allocation=loss"],
        ["method=dsnot", "method/score=ria"],
    ],
)
def test_what_fits_together_is_taken(overrides):
    read(*overrides)


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
        sections.read(edited("method.damping", 0.1))
    with pytest.raises(ConfigError, match=r"params.yaml: found \"sections \['extra'\]\""):
        sections.read(edited("extra", {"a": 1}))


@pytest.mark.parametrize("key", [1, 1.5, True])
def test_a_name_that_is_no_text_is_refused_whatever_was_read_before(key):
    plain = OmegaConf.to_container(composed("calibration=c4"))
    assert sections.read(OmegaConf.create(plain))
    (source,) = plain["calibration"]["sources"].values()
    plain["calibration"]["sources"] = {key: source}
    with pytest.raises(ConfigError, match="calibration"):
        sections.read(OmegaConf.create(plain))


def test_bytes_are_refused():
    plain = OmegaConf.to_container(composed())
    plain["publish"]["name"] = b"a"
    with pytest.raises(ConfigError, match="publish"):
        sections.read(OmegaConf.create(plain))


def test_what_is_read_twice_is_not_the_same_object():
    cfg = composed()
    first, second = sections.read(cfg), sections.read(cfg)
    first["prune"].micro_batch = 17
    first["evaluation"].corpora.clear()
    assert second == sections.read(cfg)
    assert first != second


def test_a_corpus_that_nothing_fetches_is_refused():
    with pytest.raises(ConfigError, match="calibration.sources: found 'guess', wanted one of c4_pages"):
        sections.read(edited("calibration.sources", {"guess": {"sampler": "packed", "weight": 1.0}}))


def edited(key: str, value: object):
    """params.yaml with one key written by hand, as no composition would have let it."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed()))
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


@pytest.mark.parametrize("stage", ["fetch part=base", "sample", "prune", "evaluate part=dense", "publish"])
def test_every_stage_refuses_any_bad_value_before_it_looks_for_a_weight(stage, tmp_path):
    """There is not even a checkpoint here: the configuration is refused first, in one line, without a traceback."""
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(composed()))
    command = [str(projects.commands() / "python"), "-m", *f"stages.{stage}".split(), "pattern.sparsity=1.5"]
    environment = {**projects.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ConfigError: pattern.sparsity: found 1.5, wanted a fraction of zeros in [0, 1)" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
