"""The rows and columns of the leaderboard: models, sets of choices, and the sparsities and patterns that they compete at."""

from dataclasses import dataclass

from benchmarks.table import MODEL, command

PATTERNS = {
    "50%": "pattern.sparsity=0.5",
    "60%": "pattern.sparsity=0.6",
    "70%": "pattern.sparsity=0.7",
    "2:4": "pattern=nm_2_4",
    "4:8": "pattern=nm_4_8",
}
UNSTRUCTURED = ("50%", "60%", "70%")
SPARSER = ("60%", "70%")
TEXTS = ("wikipedia", "wikipedia_long")  # of evaluation=perplexity; the first decides the order of rows
SEEDS = (0, 1, 2)  # of the calibration
PUBLISHED = ("Wanda", "SparseGPT")  # what the others are compared with


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the leaderboard.

    overrides: what composes it, beside pattern and seed. patterns: those it is for.
    leads: patterns at which the comparison stands on it, so that all its seeds come before other contenders.
    """

    name: str
    overrides: str
    patterns: tuple[str, ...] = tuple(PATTERNS)
    leads: tuple[str, ...] = ()


GROUPED = ("2:4", "4:8")
CONTENDERS = (
    Contender(name="Wanda", overrides="method=wanda"),
    Contender(name="SparseGPT", overrides="method=sparsegpt", leads=tuple(PATTERNS)),
    Contender(
        name="short ADMM, loss allocation, distilled",
        overrides="method=admm_short allocation=loss reconstruction=distilled",
        patterns=UNSTRUCTURED,
        leads=("50%",),
    ),
    Contender(
        name="short ADMM, loss allocation, distilled in two passes",
        overrides="method=admm_short allocation=loss reconstruction=distilled reconstruction.epochs=2",
        patterns=SPARSER,
        leads=SPARSER,
    ),
    Contender(
        name="short ADMM, permuted, distilled",
        overrides="method=admm_short reconstruction=distilled pattern.permutation_rounds=2",
        patterns=GROUPED,
    ),
    Contender(
        name="short ADMM, permuted, distilled in two passes",
        overrides="method=admm_short reconstruction=distilled reconstruction.epochs=2 pattern.permutation_rounds=2",
        patterns=GROUPED,
        leads=GROUPED,
    ),
    # What is quick before what learns, so that a table begun compares many.
    Contender(name="ADMM, loss allocation", overrides="method=admm allocation=loss", patterns=UNSTRUCTURED),
    Contender(name="ADMM", overrides="method=admm"),
    Contender(name="SparseGPT, loss allocation", overrides="method=sparsegpt allocation=loss", patterns=UNSTRUCTURED),
    Contender(name="swaps + least squares", overrides="method=swaps_least_squares"),
    Contender(name="Wanda + least squares", overrides="method=wanda_least_squares"),
    Contender(name="Wanda + SparseGPT update", overrides="method=wanda_sparsegpt"),
    Contender(name="swaps", overrides="method=swaps"),
    Contender(name="DSnoT", overrides="method=dsnot"),
    Contender(name="RIA", overrides="method=ria"),
    Contender(name="SparseGPT, OWL", overrides="method=sparsegpt allocation=owl", patterns=UNSTRUCTURED),
    Contender(name="SparseGPT, AlphaPruning", overrides="method=sparsegpt allocation=alphapruning", patterns=UNSTRUCTURED),
    Contender(name="Wanda, alpha search", overrides="method=wanda_variant", patterns=UNSTRUCTURED),
    Contender(name="OBS score", overrides="method=obs"),
    Contender(name="magnitude", overrides="method=magnitude"),
    Contender(name="magnitude, per matrix", overrides="method=magnitude_per_matrix", patterns=UNSTRUCTURED),
    Contender(name="short ADMM, distilled", overrides="method=admm_short reconstruction=distilled"),
    Contender(
        name="short ADMM, loss allocation, reconstruction",
        overrides="method=admm_short allocation=loss reconstruction=block",
        patterns=UNSTRUCTURED,
    ),
    Contender(name="short ADMM, reconstruction", overrides="method=admm_short reconstruction=block"),
    Contender(name="SparseGPT, distilled", overrides="method=sparsegpt reconstruction=distilled"),
    Contender(name="Wanda, distilled", overrides="method=wanda reconstruction=distilled"),
    Contender(
        name="SparseGPT, loss allocation, distilled",
        overrides="method=sparsegpt allocation=loss reconstruction=distilled",
        patterns=UNSTRUCTURED,
    ),
    Contender(
        name="Wanda, loss allocation, distilled",
        overrides="method=wanda method.comparison_group=matrix allocation=loss reconstruction=distilled",
        patterns=UNSTRUCTURED,
    ),
    Contender(
        name="short ADMM, permuted, reconstruction",
        overrides="method=admm_short reconstruction=block pattern.permutation_rounds=4",
        patterns=GROUPED,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the leaderboard, with a table of its own.

    base: the option of conf/base. label: what it is, for notes. names: the contenders that compete on it.
    best: number of contenders of a pattern, the best by their first seeds, that are measured with every seed as those that lead are.
    """

    base: str
    label: str
    names: tuple[str, ...]
    best: int

    @property
    def contenders(self) -> list[Contender]:
        return [contender for contender in CONTENDERS if contender.name in self.names]


SMOLLM2 = Model(base="smollm2_135m", label=MODEL, names=tuple(contender.name for contender in CONTENDERS), best=4)
GEMMA3 = Model(
    base="gemma3_270m",
    label="gemma-3-270m (a 4-bit GGUF file, Q4_K_M, dequantised to bfloat16)",
    names=(
        *PUBLISHED,
        "short ADMM, loss allocation, distilled",
        "short ADMM, loss allocation, distilled in two passes",
        "short ADMM, permuted, distilled",
        "short ADMM, permuted, distilled in two passes",
        "ADMM",
        "SparseGPT, loss allocation",
        "swaps + least squares",
    ),
    best=0,
)
MODELS = (SMOLLM2, GEMMA3)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    base: str
    contender: str
    overrides: str
    pattern: str
    seed: int

    @property
    def arguments(self) -> list[str]:
        """Of the experiment, without defaults and evaluation."""
        base = [f"base={self.base}"] if self.base != SMOLLM2.base else []
        seed = [f"calibration.seed={self.seed}"] if self.seed else []
        return [*base, PATTERNS[self.pattern], *self.overrides.split(), *seed]

    @property
    def cell(self) -> str:
        """What it shares with other seeds and models."""
        return f"{self.pattern} {self.overrides}"

    @property
    def command(self) -> str:
        return " ".join([*command(" ".join([*self.arguments, "evaluation=perplexity"])), "evaluate_sparse"])


def points(model: Model) -> list[Point]:
    """Every contender at every pattern that it is for, with every seed.

    First seeds before others, those that lead before others, 4:8 last, the contenders in their order.
    """
    found = [
        (
            pattern not in contender.leads,
            Point(base=model.base, contender=contender.name, overrides=contender.overrides, pattern=pattern, seed=seed),
        )
        for contender in model.contenders
        for pattern in contender.patterns
        for seed in SEEDS
    ]
    found.sort(key=lambda one: (one[1].seed != SEEDS[0], one[0], one[1].seed, one[1].pattern == "4:8"))
    return [point for _, point in found]
