"""Updates: methods that reduce the error of pruning. One module defines one update, with its table entry at the end."""

import sys

from stages.pruning.entries import Update
from stages.schema import Table

UPDATES: Table[Update] = Table.collected(sys.modules[__name__], Update)
