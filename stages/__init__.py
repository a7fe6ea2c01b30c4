"""sparsesweep: one-shot pruning of language models as a pipeline of stages."""

import os
import sys

# Progress bars of the libraries, like ours, are for a terminal only; they read this when first imported.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
