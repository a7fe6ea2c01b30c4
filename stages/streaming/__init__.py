"""A decoder of any size, one block in memory at a time."""
