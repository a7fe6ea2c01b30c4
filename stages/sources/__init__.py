"""Where checkpoints and text come from."""
