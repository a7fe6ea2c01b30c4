import pytest

from stages.pruning.distillation import Distillation
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.section import Propagation
from tests.methods import MAGNITUDE, sparsegpt

RECONSTRUCTION = Reconstruction(epochs=1, learning_rate=1e-3, search=False)
DISTILLATION = Distillation(first=2, epochs=1, learning_rate=1e-3)


def plan_of(method=MAGNITUDE, propagate: str = "pruned", **how) -> Plan:
    return Plan(method=method, patterns={}, propagate=propagate, error_tokens=1, expert_tokens=0, **how)


@pytest.mark.parametrize("how", [{"reconstruction": RECONSTRUCTION}, {"distillation": DISTILLATION}])
def test_training_with_dense_propagation_is_refused(how):
    with pytest.raises(ValueError, match="found dense propagation with training, wanted pruned propagation"):
        plan_of(propagate="dense", **how)


def test_an_unknown_propagation_is_refused():
    with pytest.raises(ValueError, match="'sideways' is not a valid Propagation"):
        plan_of(propagate="sideways")


def test_propagations_are_the_words_of_the_configuration():
    assert [str(propagation) for propagation in Propagation] == ["pruned", "dense", "sequential"]


def test_a_plan_says_whether_kept_weights_are_trained_and_whether_they_change():
    assert (plan_of().trains, plan_of().changes_weights) == (False, False)
    assert (plan_of(sparsegpt()).trains, plan_of(sparsegpt()).changes_weights) == (False, True)
    assert (plan_of(reconstruction=RECONSTRUCTION).trains, plan_of(distillation=DISTILLATION).changes_weights) == (True, True)


def test_blocks_that_are_distilled_are_not_reconstructed():
    plan = plan_of(reconstruction=RECONSTRUCTION, distillation=DISTILLATION)
    assert [plan.reconstruction_of(index) for index in range(4)] == [RECONSTRUCTION, RECONSTRUCTION, None, None]
