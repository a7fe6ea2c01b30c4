"""Run a decoder of any size with one block in memory at a time."""
