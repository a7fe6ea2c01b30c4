"""Sources of checkpoints and text."""
