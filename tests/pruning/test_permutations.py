import itertools

import pytest
import torch

from stages.pruning.patterns import Nm
from stages.pruning.permutations import channel_permutation, kept_score


def random_scores(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Like a matrix with some strong input channels: |W| times a norm of each column."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator).abs() * norms


def gained(scores: torch.Tensor, order: torch.Tensor, pattern: Nm) -> float:
    return kept_score(scores, order, pattern) - kept_score(scores, torch.arange(scores.shape[1]), pattern)


def partitions_in_two(columns: int):
    """Every way to fill two equal groups, once."""
    for rest in itertools.combinations(range(1, columns), columns // 2 - 1):
        first = (0, *rest)
        yield torch.tensor([*first, *(column for column in range(columns) if column not in first)])


def test_the_kept_score_is_that_of_the_mask():
    scores, pattern = random_scores(5, 16, seed=0), Nm(kept=2, group=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    in_order = scores[:, order]
    assert kept_score(scores, order, pattern) == pytest.approx(in_order[pattern.mask(in_order)].sum().item(), rel=1e-6)


def test_strong_columns_of_one_group_are_distributed_by_hand():
    """Of 9 9 9 9 | 1 1 1 1, two of four keep 20; of 9 9 1 1 | 9 9 1 1 they keep 36."""
    scores, pattern = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]]), Nm(kept=2, group=4)
    order = channel_permutation(scores, 2, 4, rounds=1)
    assert kept_score(scores, torch.arange(8), pattern) == 20
    assert kept_score(scores, order, pattern) == 36
    assert sorted(order[:4].tolist())[0] == 0 and (order[:4] < 4).sum() == 2


def test_strong_columns_of_the_first_groups_are_all_kept():
    """Half of the columns are strong, all in the first groups: then every strong weight can be kept."""
    strong = torch.arange(64) < 32
    scores = random_scores(20, 64, seed=0).clamp(min=0.1, max=1) + 10 * strong
    order = channel_permutation(scores, 2, 4, rounds=2)
    assert Nm(kept=2, group=4).mask(scores[:, order])[:, strong[order]].all()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_kept_score_is_never_lower_than_that_of_no_reordering(kept, group, seed):
    scores = random_scores(12, 48, seed)
    order = channel_permutation(scores, kept, group, rounds=3)
    assert sorted(order.tolist()) == list(range(48))
    assert order.dtype == torch.int64
    assert gained(scores, order, Nm(kept=kept, group=group)) > 0


@pytest.mark.parametrize("rounds", [0, 4])
def test_columns_stay_in_place_if_nothing_is_gained(rounds):
    best_already = torch.tensor([[9.0, 8.0, 1.0, 2.0, 7.0, 6.0, 2.0, 1.0]])
    for scores in (best_already, torch.ones(3, 8), torch.zeros(3, 8), torch.rand(3, 4)):
        assert torch.equal(channel_permutation(scores, 2, 4, rounds=rounds), torch.arange(scores.shape[1]))


@pytest.mark.parametrize("kept", [0, 4])
def test_columns_stay_in_place_if_all_or_nothing_is_kept(kept):
    assert torch.equal(channel_permutation(random_scores(3, 16, seed=0), kept, 4, rounds=1), torch.arange(16))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 2), (3, 4)])
def test_after_many_rounds_no_exchange_of_two_columns_gains(kept, group):
    """All exchanges counted out: the gain by distances found every one that there was."""
    pattern = Nm(kept=kept, group=group)
    for seed in range(3):
        scores = random_scores(4, 12, seed)
        order = channel_permutation(scores, kept, group, rounds=60)
        reached = kept_score(scores, order, pattern)
        for i, j in itertools.combinations(range(12), 2):
            other = order.clone()
            other[[i, j]] = order[[j, i]]
            assert kept_score(scores, other, pattern) <= reached * (1 + 1e-5)


def test_more_rounds_never_lose():
    scores, pattern = random_scores(30, 96, seed=3), Nm(kept=2, group=4)
    gains = [gained(scores, channel_permutation(scores, 2, 4, rounds=rounds), pattern) for rounds in range(6)]
    assert all(after >= before * (1 - 1e-6) for before, after in itertools.pairwise(gains))
    assert gains[-1] > 1.05 * gains[0]


def fractions_of_the_best_gain(rows: int, rounds: int) -> torch.Tensor:
    """Gain / the best that any order has, of 40 matrices with eight columns; 1 where there is nothing to gain."""
    pattern, fractions = Nm(kept=2, group=4), []
    for seed in range(40):
        scores = torch.rand(rows, 8, generator=torch.Generator().manual_seed(seed))
        best = max(gained(scores, order, pattern) for order in partitions_in_two(8))
        gain = gained(scores, channel_permutation(scores, 2, 4, rounds=rounds), pattern)
        assert gain <= best + 1e-5
        fractions.append(gain / best if best > 1e-5 else 1.0)
    return torch.tensor(fractions)


def test_two_rows_of_eight_columns_get_the_best_of_all_orders():
    assert fractions_of_the_best_gain(rows=2, rounds=8).min() > 1 - 1e-4


def test_many_rows_get_most_of_the_best_gain_but_not_always_all():
    """Exchanges of two columns end where only one of four would help: of equal columns and two groups that is not seldom."""
    fractions = fractions_of_the_best_gain(rows=8, rounds=8)
    assert fractions.mean() > 0.9
    assert 0.5 < (fractions > 1 - 1e-4).float().mean() < 1


def test_the_same_scores_give_the_same_order_and_stay_as_they_were():
    scores = random_scores(10, 64, seed=0)
    before = scores.clone()
    one, other = (channel_permutation(scores, 2, 4, rounds=3) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(scores, before)


def test_columns_that_groups_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="found 10 columns, wanted a multiple of pattern.group = 4"):
        channel_permutation(torch.ones(2, 10), 2, 4, rounds=1)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite, wanted finite scores"):
        channel_permutation(torch.tensor([[1.0, 2.0, float("nan"), 0.0]]), 2, 4, rounds=1)
