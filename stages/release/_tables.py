"""A stand-in for the tables of stages/pruning, until they are there."""

from stages import config
from stages.schema import Citation, Entry, Table

HAN = Citation(text="Han et al. 2015", url="https://arxiv.org/abs/1506.02626")
SUN = Citation(text="Sun et al. 2024", url="https://arxiv.org/abs/2306.11695")
RIA = Citation(text="Zhang et al. 2024", url="https://openreview.net/forum?id=Tr0lPx9woF")
FRANTAR = Citation(text="Frantar & Alistarh 2023", url="https://arxiv.org/abs/2301.00774")
MENG = Citation(text="Meng et al. 2024", url="https://arxiv.org/abs/2406.07831")
ZIMMER = Citation(text="Zimmer et al. 2025", url="https://arxiv.org/abs/2512.10922")
DSNOT = Citation(text="Zhang et al. 2024", url="https://arxiv.org/abs/2310.08915")
YIN = Citation(text="Yin et al. 2024", url="https://arxiv.org/abs/2310.05175")
LU = Citation(text="Lu et al. 2024", url="https://arxiv.org/abs/2410.10912")


def _table(options: dict[str, type], facts: dict[str, tuple[str, Citation | None]]) -> Table[Entry]:
    return Table([Entry(name=name, parameters=options[name], summary=facts[name][0], citation=facts[name][1]) for name in options])


SCORES = _table(
    config.SCORES.options,
    {
        "magnitude": ("the weight's magnitude", HAN),
        "wanda": ("magnitude times the norm of the weight's input", SUN),
        "wanda_variant": ("Wanda by the variant in its authors' code", SUN),
        "ria": ("relative importance and activations", RIA),
        "obs": ("Optimal Brain Surgeon", FRANTAR),
    },
)
UPDATES = _table(
    config.UPDATES.options,
    {
        "none": ("no update", None),
        "sparsegpt": ("compensation column by column", FRANTAR),
        "least_squares": ("least squares by conjugate gradients on the Gram matrix", None),
        "admm": ("mask and values by ADMM", MENG),
        "swaps": ("exact swaps of the mask", ZIMMER),
        "dsnot": ("swaps that lower the expected error", DSNOT),
    },
)
ALLOCATIONS = _table(
    config.ALLOCATIONS.options,
    {
        "uniform": ("every matrix as sparse as the whole", None),
        "owl": ("blocks with many outliers are pruned less", YIN),
        "alphapruning": ("blocks with heavy-tailed spectra are pruned less", LU),
        "loss": ("zeros lie where the gradients of a few calibration windows say that they cost least", None),
    },
)
RECONSTRUCTIONS = _table(
    config.RECONSTRUCTIONS.options,
    {
        "none": ("none", None),
        "block": ("the kept weights of each block are trained to give the dense model's hidden states", None),
        "distilled": ("the kept weights of the last blocks are trained together to predict what the dense model predicts", None),
    },
)
PATTERNS = _table(config.PATTERNS.options, {"unstructured": ("any weights", None), "nm": ("N of every M consecutive input columns", None)})
