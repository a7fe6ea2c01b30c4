"""Scores of the dense and the pruned model, and their comparison."""
