"""Scores: what a weight is worth. One module each; an entry at its end puts it into the table."""

import sys

from stages.pruning.entries import Score
from stages.schema import Table

SCORES: Table[Score] = Table.collected(sys.modules[__name__], Score)
