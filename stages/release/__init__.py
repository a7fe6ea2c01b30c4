"""The pruned model as a plain checkpoint, checked, with its card."""
