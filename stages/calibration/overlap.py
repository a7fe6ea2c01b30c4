"""Find n-grams of tokens that occur both in calibration and in evaluation text, by a hash of 64 bits:

    hash(i) = sum_k (token[i + k] + 1) m^(n - 1 - k)   mod 2^64

Two n-grams with the same hash count as equal.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication mod 2^64 loses nothing


def hashes(tokens: list[int], size: int) -> npt.NDArray[np.uint64]:
    """Compute the hash of each n-gram.

    Args:
        tokens: token ids. size: tokens in an n-gram.

    Returns:
        [len(tokens) - size + 1], uint64; empty for a shorter text.
    """
    ids = np.asarray(tokens, dtype=np.uint64) + np.uint64(1)
    count = max(len(ids) - size + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for k in range(size):
        total = total * MULTIPLIER + ids[k : k + count]
    return total


class NgramIndex:
    """All n-grams of the evaluation text.

    Args:
        texts: token ids of each text.
        size: tokens in an n-gram.
    """

    def __init__(self, texts: Iterable[list[int]], size: int) -> None:
        self.size = size
        hashes_by_text = [hashes(tokens, size) for tokens in texts]
        self._known = np.sort(np.concatenate([*hashes_by_text, np.zeros(0, dtype=np.uint64)]))

    def shared(self, tokens: list[int]) -> list[int]:
        """Find the offsets in `tokens` at which an n-gram of the index begins."""
        token_hashes = hashes(tokens, self.size)
        from_left, from_right = (np.searchsorted(self._known, token_hashes, side=side) for side in ("left", "right"))
        return np.flatnonzero(from_left < from_right).tolist()
