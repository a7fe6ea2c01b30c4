"""Allocations: rules for the sparsity of each matrix. One module defines one allocation, with its table entry at the end."""

import sys

from stages.pruning.entries import Allocation
from stages.schema import Table

ALLOCATIONS: Table[Allocation] = Table.collected(sys.modules[__name__], Allocation)
