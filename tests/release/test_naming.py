import itertools
import random
import re

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from stages.release.naming import default_name, is_legal
from tests import deltas

NM = {"name": "nm", "kept": 2, "group": 4, "permutation_rounds": None}


def taken_by_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def test_a_name_is_legal_where_the_hub_takes_it():
    draw = random.Random(0)
    names = ["".join(draw.choice("aZ0-_./ é") for _ in range(draw.randint(0, 6))) for _ in range(5000)]
    names += ["a" * 96, "a" * 97, "a.git", "org/a", "org/a/b", "a--b", "a..b", "a\n"]
    for name in names:
        assert is_legal(name) == taken_by_the_hub(name), name
    assert not is_legal(None)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "big-7b-wanda-sparse50"),
        ({"pattern": {"name": "unstructured", "sparsity": 0.05}}, "big-7b-wanda-sparse5"),
        ({"pattern": {"name": "unstructured", "sparsity": 0.123456789}}, "big-7b-wanda-sparse12.3456789"),
        ({"method": {**deltas.WANDA, "comparison_group": "matrix"}}, "big-7b-wanda-sparse50-per-matrix"),
        ({"pattern": NM}, "big-7b-wanda-2of4"),
        ({"pattern": {**NM, "permutation_rounds": 1}}, "big-7b-wanda-2of4-permuted"),
        ({"label": "sparsegpt (ria), owl allocation"}, "big-7b-sparsegpt-ria-owl-allocation-sparse50"),
        ({"label": "wanda_sparsegpt, no update"}, "big-7b-wanda_sparsegpt-no-update-sparse50"),
    ],
)
def test_a_name_says_base_method_and_amount(changes, name):
    assert default_name("org/big-7b", deltas.recipe(**changes)) == name


def test_what_is_too_long_says_its_choices_and_ends_with_a_hash():
    choices = {"allocation": {"name": "loss"}, "reconstruction": {"name": "distilled"}}
    label = "admm_short (wanda + admm, per matrix), loss allocation, distilled, one pass"
    method = {**deltas.WANDA, "name": "admm_short", "comparison_group": "matrix"}
    name = default_name("org/big-7b-instruct", deltas.recipe(label=label, method=method, **choices))
    assert re.fullmatch("big-7b-instruct-admm_short-loss-distilled-sparse50-per-matrix-[0-9a-f]{8}", name)


@pytest.mark.parametrize(
    "base", ["org/big-7b", "a", "x" * 96, "mine and yours", "größer/Modell--1..2", "模型", "org/x.git", "-", "org/b-.", "a-..b"]
)
def test_a_name_is_legal_whatever_the_base_is_called(base):
    for label in ("wanda", "sparsegpt (ria), no update, alphapruning allocation, distilled, one pass", "x" * 100, "(x)"):
        name = default_name(base, deltas.recipe(label=label))
        assert is_legal(name), name
        assert "/" not in name
        assert len(name) <= 96
        assert name == default_name(base, deltas.recipe(label=label))


def test_recipes_that_differ_in_more_than_unstated_numbers_have_different_names():
    labels = ["wanda", "wanda, one pass", "wanda, swaps", "wanda_variant", "wanda (ria)", "wanda, owl allocation"]
    groups = [{**deltas.WANDA, "comparison_group": group} for group in ("row", "matrix")]
    amounts = [{"name": "unstructured", "sparsity": sparsity} for sparsity in (0.5, 0.05, 0.55, 0.505)]
    made = [deltas.recipe(label=a, method=b, pattern=c) for a, b, c in itertools.product(labels, groups, amounts)]
    made += [deltas.recipe(pattern={**NM, "kept": kept, "permutation_rounds": rounds}) for kept in (1, 2) for rounds in (None, 1)]
    for base in ("org/big-7b", "org/" + "x" * 96):
        assert len({default_name(base, recipe) for recipe in made}) == len(made)
