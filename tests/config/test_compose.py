"""Values set on what was composed before are what Hydra composes."""

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.config import compose
from stages.config.compose import composed


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation=sweep", "pattern.sparsity=0.43"],
        ["calibration.seed=3", "pattern.sparsity=1.5e-1", "allocation=loss", "allocation.gradient_weights=[1.0]"],
        ["base=hub", "base.repo=a/b", "base.revision=" + "1a" * 20],
        ["publish.name=a-b", "evaluation.tasks=[boolq]", "evaluation.tasks=[]"],
        ["pattern=nm_2_4", "calibration.sources.c4_pages={weight: 1.0}"],
    ],
)
def test_values_are_set_as_hydra_sets_them(overrides, monkeypatch):
    wanted = compose._by_hydra(overrides, resolved=True)
    composed(*overrides)
    monkeypatch.setattr(compose, "_by_hydra", lambda *_, **__: pytest.fail("composed anew"))
    assert OmegaConf.to_yaml(composed(*overrides)) == OmegaConf.to_yaml(wanted)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("pattern.sparsity=1.5", OmegaConfBaseException, "pattern.sparsity: found 1.5, wanted a fraction"),
        ("pattern.sparsitty=0.5", HydraException, "Could not override 'pattern.sparsitty'"),
        ("method=wandaa", HydraException, "Available options in 'method'"),
        ("publish.name=${oc.env:HOME}", OmegaConfBaseException, "publish.name: found"),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(override, error, message):
    composed("pattern.sparsity=0.5")
    with pytest.raises(error, match=message):
        composed(override)


def test_one_composition_does_not_change_the_next():
    composed("calibration.seed=5")
    assert composed("pattern.sparsity=0.25").calibration.seed == composed().calibration.seed
