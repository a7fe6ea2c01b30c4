import pytest
import torch

from stages.pruning.statistics import Gram, SquaredNorm

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


def test_gram_is_twice_the_mean_over_windows_of_the_outer_products():
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 4)
    gram = Gram(4, CPU)
    gram.add(inputs[:2])
    gram.add(inputs[2:])
    expected = sum(2 * window.T @ window for window in inputs) / 3
    torch.testing.assert_close(gram.value, expected)


def test_the_factor_is_of_the_damped_inverse():
    torch.manual_seed(0)
    gram = Gram(4, CPU)
    gram.add(torch.randn(1, 20, 4))
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(4)
    factor = gram.inverse_factor(0.01)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, damped.inverse())


def test_a_gram_matrix_that_is_not_finite_is_refused():
    gram = Gram(2, CPU)
    gram.add(torch.tensor([[[1.0, float("inf")]]]))
    with pytest.raises(ArithmeticError, match="NaN or infinity in the Gram matrix"):
        gram.inverse_factor(0.01)


def test_a_gram_matrix_that_does_not_factor_is_refused():
    gram = Gram(2, CPU)
    gram.value = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ArithmeticError, match="does not factor at damping 0.01"):
        gram.inverse_factor(0.01)
