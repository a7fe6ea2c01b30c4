"""Allocations: how sparse each matrix is. One module each; an entry at its end puts it into the table."""

import sys

from stages.pruning.entries import Allocation
from stages.schema import Table

ALLOCATIONS: Table[Allocation] = Table.collected(sys.modules[__name__], Allocation)
