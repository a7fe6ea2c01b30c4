"""The pruned model next to the dense one: its results, paired, and the bytes of what pruning made."""
