"""The standard error of a score that is no mean of rows, by the bootstrap over what is independent.

    stderr = sqrt(sum_b (s_b - mean s)^2 / (B - 1)),  s_b of as many clusters, drawn with replacement          # Efron 1979, Ann. Stat. 7

Rows that share a document are drawn together. Tasks of a group are drawn each on its own.
"""

import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

SEED, RESAMPLES = 0, 200  # the error of the error is then about 1 / sqrt(2 * 200), 5%
Items: TypeAlias = Mapping[str, Sequence[Any]]  # task -> what its score is made of, row by row


def bootstrap_error(score: Callable[[Items], float], items: Items, clusters: Mapping[str, Sequence[int]]) -> float | None:
    """The standard error of a score.

    Args:
        score: of rows by task, as many as there are or not. items: task -> of each row. clusters: task -> of each row, what it shares with
            others.

    Returns:
        None where a task has fewer than two clusters.
    """
    members: dict[str, list[list[Any]]] = {}
    for task, values in items.items():
        of_cluster: dict[int, list[Any]] = {}
        for cluster, value in zip(clusters[task], values, strict=True):
            of_cluster.setdefault(cluster, []).append(value)
        members[task] = list(of_cluster.values())
    if min(map(len, members.values())) < 2:
        return None
    numbers = random.Random(SEED)
    drawn = [{task: sum(numbers.choices(of, k=len(of)), []) for task, of in members.items()} for _ in range(RESAMPLES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sklearn's, of a draw that has none of the labels: its score counts as 0
        return statistics.stdev(map(score, drawn))
