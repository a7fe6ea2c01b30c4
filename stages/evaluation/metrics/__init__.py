"""Metrics of text: one module defines one, with its table entry at the end."""

import sys

from stages.evaluation.metric import Metric
from stages.schema import Table

METRICS: Table[Metric] = Table.collected(sys.modules[__name__], Metric)
