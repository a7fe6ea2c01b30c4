"""What llama.cpp makes of a text with a GGUF file: its tokens, and the logits at each, in a process of its own.

python -m tests.release.llama_cpp.score FILE TEXT OUT
"""

import sys

import numpy as np
from llama_cpp import Llama


def main(file: str, text: str, out: str) -> None:
    model = Llama(model_path=file, n_ctx=128, n_batch=128, logits_all=True, n_threads=1, verbose=False)
    tokens = model.tokenize(text.encode(), add_bos=False, special=False)
    model.eval(tokens)
    np.savez(out, tokens=np.array(tokens), logits=np.array(model.scores[: len(tokens)]))
    model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
