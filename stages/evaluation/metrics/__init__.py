"""Metrics of text: one module defines one, with its table entry at the end."""

import sys

from stages.evaluation.metric import Metric, Shown
from stages.schema import Table

METRICS: Table[Metric] = Table.collected(sys.modules[__name__], Metric)


def shown_measurements() -> dict[str, Shown]:
    """How measurements of text are shown, by the measurement's name; those that no metric shows are not in it."""
    return {shown.metric: shown for metric in METRICS.values() for shown in metric.shown}
