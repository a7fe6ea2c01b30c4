"""Scores of a model on texts, tasks and prompts."""
