"""Reconstructions: how kept weights are trained on the calibration windows. One module each; an entry puts it into the table."""

import sys

from stages.pruning.entries import Training
from stages.schema import Table

RECONSTRUCTIONS: Table[Training] = Table.collected(sys.modules[__name__], Training)
