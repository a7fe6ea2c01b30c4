"""Scores: the importance of each weight. One module defines one score, with its table entry at the end."""

import sys

from stages.pruning.entries import Score
from stages.schema import Table

SCORES: Table[Score] = Table.collected(sys.modules[__name__], Score)
