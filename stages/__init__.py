"""sparsesweep: one-shot pruning of language models as a pipeline of stages."""

import os
import sys

# The one switch for progress bars, the libraries' and ours: the first process shows them, on a terminal. Read when tqdm is imported.
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
