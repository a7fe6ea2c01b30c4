"""All experiments of a project: what they are, what came of them, and how they compare."""
