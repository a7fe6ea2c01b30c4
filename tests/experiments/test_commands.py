"""The line that runs an experiment again composes the same sections."""

import pytest
from omegaconf import OmegaConf

from stages.config.compose import composed
from stages.experiments.commands import command, overrides

COMMIT = "0" * 40


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "dvc exp run"),
        (["pattern.sparsity=0.6"], "dvc exp run -S pattern.sparsity=0.6"),
        (["experiment=best_50"], "dvc exp run -S method=admm_short -S allocation=loss -S reconstruction=distilled"),
        (
            ["method=sparsegpt", "method/score=ria", "allocation=owl"],
            "dvc exp run -S method=sparsegpt -S method/score=ria -S allocation=owl",
        ),
        (["evaluation=perplexity", "pattern=nm_4_8"], "dvc exp run -S evaluation=perplexity -S pattern=nm_4_8"),
        (
            ["base=hub", "base.repo=a/b", f"base.revision={COMMIT}"],
            f"dvc exp run -S base=hub -S base.repo=a/b -S 'base.revision='\"'\"'{COMMIT}'\"'\"''",
        ),
        (["allocation=loss", "allocation.gradient_weights=[1.0]"], "dvc exp run -S allocation=loss -S 'allocation.gradient_weights=[1.0]'"),
        (["publish.name='null'"], """dvc exp run -S 'publish.name='"'"'null'"'"''"""),
    ],
)
def test_the_line_names_options_and_the_values_that_these_do_not_have(given, line):
    assert command(OmegaConf.to_container(composed(*given))) == line


def test_the_line_of_what_was_not_published_stops_at_its_scores():
    params = OmegaConf.to_container(composed("pattern.sparsity=0.6"))
    assert command(params, published=False) == "dvc exp run -S pattern.sparsity=0.6 evaluate_sparse"


@pytest.mark.parametrize(
    "given",
    [
        ["experiment=best_2_4", "base=gemma3_270m", "calibration.seed=2"],
        ["calibration=wikitext2", "evaluation=paper"],
        ["experiment=smoke", "method/update=swaps", "method.update.cycles=3"],
        [r"""evaluation.generations.prompts=['a, b: it\'s','[x] {y}','"q" = 1']"""],
        ["text.evaluation.wikipedia.license='a, b'", "evaluation.tasks=[]"],
    ],
)
def test_the_overrides_compose_the_same_sections(given):
    sections = OmegaConf.to_container(composed(*given))
    assert OmegaConf.to_container(composed(*overrides(sections))) == sections


def test_sections_of_before_a_release_could_show_its_frontier_have_their_line():
    sections = OmegaConf.to_container(composed("pattern.sparsity=0.6"))
    del sections["publish"]["frontier"]
    assert command(sections) == "dvc exp run -S pattern.sparsity=0.6"


def test_sections_that_nothing_composes_have_no_line():
    sections = OmegaConf.to_container(composed())
    del sections["method"]["score"]
    assert command(sections) is None
    del sections["method"]
    assert command(sections) is None
    sections = OmegaConf.to_container(composed())
    sections["pattern"]["gone"] = 1
    assert command(sections) is None
