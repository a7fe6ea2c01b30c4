import pytest
import torch

from stages.pruning.statistics import Gram, Moments, SquaredNorm, first_to_factor

CPU = torch.device("cpu")


def test_squared_norm_by_hand():
    statistic = SquaredNorm(2, CPU)
    statistic.add(torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]]))
    assert statistic.value.tolist() == [pytest.approx(5.0), pytest.approx(10.0)]


def test_the_micro_batch_changes_no_bit_of_the_squared_norm():
    torch.manual_seed(0)
    inputs = torch.randn(6, 5, 4)
    whole, parts = SquaredNorm(4, CPU), SquaredNorm(4, CPU)
    whole.add(inputs)
    for window in inputs:
        parts.add(window[None])
    assert torch.equal(whole.value, parts.value)


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 64])
def test_gram_is_the_sum_of_the_outer_products_of_the_tokens(columns):
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, columns)
    gram = Gram(columns, CPU)
    gram.add(inputs[:2])
    gram.add(inputs[2:])
    gram.finish()
    torch.testing.assert_close(gram.value, sum(window.T @ window for window in inputs))
    assert torch.equal(gram.value, gram.value.T)


def test_the_factor_is_of_the_damped_inverse():
    torch.manual_seed(0)
    gram = Gram(4, CPU)
    gram.add(torch.randn(1, 20, 4))
    gram.finish()
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(4)
    factor = gram.inverse_factor(0.01, 1.0)
    assert gram.damping == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, damped.inverse())


@pytest.mark.parametrize("columns", [5, 64])
def test_gram_takes_bfloat16_inputs_as_float32(columns):
    torch.manual_seed(0)
    inputs = torch.randn(2, 300, columns).bfloat16()
    grams = []
    for tokens in (inputs, inputs.float()):
        gram = Gram(columns, CPU)
        gram.add(tokens)
        gram.finish()
        grams.append(gram.value)
    assert grams[0].dtype == torch.float32
    assert torch.equal(*grams)
    torch.testing.assert_close(grams[0], (inputs.double().flatten(0, 1).T @ inputs.double().flatten(0, 1)).float(), rtol=1e-4, atol=1e-3)


def test_reordered_moments_are_those_of_the_reordered_inputs():
    torch.manual_seed(0)
    inputs, order = torch.randn(2, 20, 6).bfloat16(), torch.tensor([3, 0, 5, 1, 2, 4])
    reordered, expected = Moments(6, CPU), Moments(6, CPU)
    reordered.add(inputs)
    reordered.finish()
    reordered.reorder(order)
    expected.add(inputs.float()[..., order])
    expected.finish()
    for name in ("mean", "variance", "squared_norm"):
        torch.testing.assert_close(getattr(reordered, name), getattr(expected, name))
    assert torch.equal(expected.mean, inputs.float().double().flatten(0, 1).mean(dim=0).float()[order])


def test_the_damped_matrix_has_a_larger_diagonal_and_dead_inputs_get_a_small_diagonal():
    gram = Gram(3, CPU)
    gram.value = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[2.2, 1.0, 0.0], [1.0, 4.4, 0.0], [0.0, 0.0, 2e-9]])
    torch.testing.assert_close(gram.damped(0.1), expected)


def test_a_live_input_keeps_its_diagonal_however_small_it_is():
    gram = Gram(2, CPU)
    gram.add(torch.tensor([[[1e-6, 1.0]]]))
    assert gram.damped(0.1).diagonal().tolist() == [pytest.approx(1.1e-12), pytest.approx(1.1)]


def test_a_gram_matrix_that_is_not_finite_is_refused():
    gram = Gram(2, CPU)
    gram.add(torch.tensor([[[1.0, float("inf")]]]))
    with pytest.raises(ArithmeticError, match="NaN or infinity in the Gram matrix"):
        gram.inverse_factor(0.01, 1.0)


def test_damping_is_raised_step_by_step_until_the_matrix_factors():
    gram = Gram(2, CPU)
    gram.value = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues 2.5 and -0.5: needs more than half the diagonal
    factor = gram.inverse_factor(0.01, 1.0)
    assert gram.damping == 1.0
    torch.testing.assert_close(factor.T @ factor, (gram.value + torch.eye(2)).inverse())


@pytest.mark.parametrize(("first", "limit", "wanted"), [(0.01, 1.0, [0.01, 0.1, 1.0]), (0.01, 0.5, [0.01, 0.1, 0.5]), (0.01, 0.01, [0.01])])
def test_damping_is_tried_tenfold_up_to_the_limit(first, limit, wanted):
    tried = []

    def attempt(damping):
        tried.append(damping)
        raise torch.linalg.LinAlgError

    with pytest.raises(ArithmeticError, match=f"at any damping from {first} to {limit:g}"):
        first_to_factor(attempt, first, limit)
    assert tried == wanted


def test_what_float32_cannot_factor_float64_does_at_the_same_damping():
    torch.manual_seed(0)
    inputs = torch.randint(-8, 9, (64, 32)).float()  # of products that float32 holds exactly, and of half the rank
    gram = Gram(64, CPU)
    gram.value = inputs @ inputs.T
    share = 1e-8
    mean = gram.value.diagonal().mean()
    assert torch.linalg.cholesky_ex(gram.value + share * mean * torch.eye(64)).info > 0
    factor = gram.inverse_factor(share, 1.0)
    assert factor.dtype == torch.float32
    assert gram.damping == share
    exact = (gram.value.double() + share * mean.double() * torch.eye(64, dtype=torch.float64)).inverse()
    torch.testing.assert_close(factor.T @ factor, exact.float(), rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_a_gram_matrix_that_does_not_factor_within_the_limit_is_refused():
    gram = Gram(2, CPU)
    gram.value = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    with pytest.raises(ArithmeticError, match="does not factor at any damping from 0.01 to 1"):
        gram.inverse_factor(0.01, 1.0)


def test_a_reordered_gram_matrix_factors_as_that_of_the_reordered_inputs():
    torch.manual_seed(0)
    inputs, order = torch.randn(2, 20, 6), torch.tensor([3, 0, 5, 1, 2, 4])
    gram, expected = Gram(6, CPU), Gram(6, CPU)
    gram.add(inputs)
    gram.finish()
    gram.inverse_factor(0.01, 0.01)
    gram.reorder(order)
    expected.add(inputs[..., order])
    expected.finish()
    torch.testing.assert_close(gram.inverse_factor(0.01, 0.01), expected.inverse_factor(0.01, 0.01))


def test_moments_by_hand():
    moments = Moments(1, CPU)
    moments.add(torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]))
    moments.finish()
    assert (moments.mean.item(), moments.variance.item(), moments.squared_norm.item()) == (3.0, 3.5, 12.5)
