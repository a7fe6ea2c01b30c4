"""Updates: what is done about the error of pruning. One module each; an entry at its end puts it into the table."""

import sys

from stages.pruning.entries import Update
from stages.schema import Table

UPDATES: Table[Update] = Table.collected(sys.modules[__name__], Update)
