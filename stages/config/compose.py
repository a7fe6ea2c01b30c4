"""conf/ composed as DVC composes it, for use as a library, by benchmarks and tests.

python -m stages.config.compose [OVERRIDE …]     what `dvc exp run -S OVERRIDE …` would write to params.yaml
"""

import copy
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.config import sections
from stages.config.params import CONF
from stages.pruning.method import Method
from stages.schema import check


def composed(*overrides: str) -> DictConfig:
    """What `dvc exp run -S OVERRIDE …` writes to params.yaml.

    Raises:
        hydra.errors.HydraException: an option or a key is unknown; lists those that are known.
        omegaconf.errors.OmegaConfBaseException: with the message of a ConfigError, see sections.read.
    """
    return _with_values(overrides) or _by_hydra(overrides, resolved=True)


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    """What options of groups compose, with the versions of libraries left as they are; must not be changed."""
    return _by_hydra(choices, resolved=False)


def _by_hydra(overrides: Sequence[str], *, resolved: bool) -> DictConfig:
    sections.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    if resolved:
        OmegaConf.resolve(cfg)
    return cfg


def _with_values(overrides: Sequence[str]) -> DictConfig | None:
    """The options composed once for all sets of values, which are then set and checked as Hydra does.

    Returns:
        None where that is not all there is to do, or a value is refused: Hydra then says why.
    """
    try:
        parsed = [(text, OverridesParser.create().parse_override(text)) for text in overrides]
        choices = tuple(text for text, override in parsed if (CONF / override.key_or_group).is_dir())
        values = [override for text, override in parsed if text not in choices]
        if not values or any(map(_is_more_than_a_value, values)):
            return None
        cfg = copy.deepcopy(_chosen(choices))
        for override in values:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException):
        return None
    return cfg


def _is_more_than_a_value(override: Override) -> bool:
    """Whether an override does more than to give a key that is there a value without interpolations."""
    plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return not plain or "$" in str(override.value())


def read(*overrides: str) -> dict[str, Any]:
    """The same as typed sections, by name."""
    return sections.read(composed(*overrides))


def method(name: str, *overrides: str) -> Method:
    """A method of conf/method.

    Args:
        name: of its file, such as "sparsegpt". overrides: as on the command line, such as "method.update.block_size=64".

    Raises:
        ConfigError: a value is out of range.
        hydra.errors.HydraException: an option or a key is unknown; lists those that are known.
    """
    sections.register(["method"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: Any = compose(overrides=[f"+method={name}", *overrides])
    section = sections.typed("method", cfg.method, Method)
    check(section, "method")
    return section


if __name__ == "__main__":
    print(OmegaConf.to_yaml(composed(*sys.argv[1:])), end="")
