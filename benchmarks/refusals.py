"""What it would take to prune the types that the census finds refused: for whoever wants one of them next."""

TAKES = {
    "blt": "three decoders and a model that cuts bytes into patches: each decoder streamed by itself, with patches handed on",
    "cpmant": "a prompt of its own before the windows: hidden states that are longer than the windows",
    "emu3": "an auto class for its text decoder, which transformers has not",
    "gemma3n": "its vision encoder's package (timm)",
    "hrm_text": "layers that nested loops call again and again: a loop over calls instead of over a list of blocks",
    "inkling2_text": "gate and up in every second row of a tensor: slices with a step",
    "mllama": "an auto class for its text decoder, which transformers has not",
    "prophetnet": "several predicted tokens at each position: hidden states that are longer than the windows",
    "reformer": "two streams of hidden states in reversible blocks",
    "xlm": "attention, MLPs and norms in lists of their own: blocks put together from several lists",
    "xlnet": "hidden states of [tokens, windows, ...]: windows in the second dimension",
}
