import torch

from stages.pruning.scores.ria import ria


def test_ria_by_hand():
    scores = ria(torch.tensor([[-3.0, 1.0], [1.0, 0.0]]), squared_norm=torch.tensor([16.0, 81.0]), power=0.5)
    assert scores.tolist() == [[(3 / 4 + 3 / 4) * 2, (1 / 1 + 1 / 4) * 3], [(1 / 4 + 1 / 1) * 2, 0.0]]


def test_ria_equals_its_formula_written_as_loops():
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 7), torch.randn(11, 7)
    scores = ria(weight, inputs.square().sum(dim=0), power=0.8)
    for i in range(5):
        for j in range(7):
            magnitude = abs(weight[i, j].item())
            column = sum(abs(w.item()) for w in weight[:, j])
            row = sum(abs(w.item()) for w in weight[i])
            norm = sum(x.item() ** 2 for x in inputs[:, j]) ** 0.5
            assert abs(scores[i, j].item() - (magnitude / column + magnitude / row) * norm**0.8) < 1e-5


def test_rows_and_columns_of_zeros_score_zero():
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert ria(weight, torch.ones(2), power=0.5).tolist() == [[0.0, 0.0], [0.0, 2.0]]


def test_an_input_that_is_always_zero_scores_zero():
    assert ria(torch.ones(1, 2), torch.tensor([0.0, 1.0]), power=0.5).tolist() == [[0.0, 1.5]]


def test_without_power_the_inputs_do_not_count():
    weight = torch.tensor([[-3.0, 1.0], [1.0, 5.0]])
    assert torch.equal(ria(weight, torch.tensor([4.0, 9.0]), power=0), ria(weight, torch.ones(2), power=1))
