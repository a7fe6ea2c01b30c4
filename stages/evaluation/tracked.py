"""What the results of an evaluation depend on, besides the model and the text."""

TRACKED = ("evaluation", *(f"environment.{library}" for library in ("torch", "transformers", "tokenizers", "datasets", "lm_eval")))
