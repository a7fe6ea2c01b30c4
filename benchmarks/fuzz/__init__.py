"""Damaged and hostile inputs for every reader of what comes from outside; see __main__.py."""

from benchmarks.fuzz import checkpoints, corpora, frontiers, hub, records, releases

READERS = (*checkpoints.READERS, *corpora.READERS, *records.READERS, *hub.READERS, *releases.READERS, *frontiers.READERS)
