"""Roundings of matrices to fewer bits: what a user would do to a model instead of pruning it, or after."""
