import torch

from stages.pruning.scores.magnitude import magnitude
from stages.pruning.scores.obs import obs
from stages.pruning.scores.wanda import wanda


def test_magnitude_by_hand():
    assert magnitude(torch.tensor([[-3.0, 2.0]])).tolist() == [[3.0, 2.0]]


def test_wanda_by_hand():
    scores = wanda(torch.tensor([[-3.0, 2.0]]), squared_norm=torch.tensor([4.0, 25.0]))
    assert scores.tolist() == [[6.0, 10.0]]


def test_obs_by_hand():
    scores = obs(torch.tensor([[-3.0, 2.0]]), root_inverse_diagonal=torch.tensor([0.5, 2.0]))
    assert scores.tolist() == [[36.0, 1.0]]


def test_wanda_equals_its_formula_written_as_loops():
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 7), torch.randn(11, 7)
    scores = wanda(weight, inputs.square().sum(dim=0))
    for i in range(5):
        for j in range(7):
            expected = abs(weight[i, j].item()) * sum(x.item() ** 2 for x in inputs[:, j]) ** 0.5
            assert abs(scores[i, j].item() - expected) < 1e-4
