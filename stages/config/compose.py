"""conf/ composed as DVC composes it, for use as a library, by benchmarks and tests.

python -m stages.config.compose [OVERRIDE …]     what `dvc exp run -S OVERRIDE …` would write to params.yaml
"""

import sys
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

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
    sections.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    OmegaConf.resolve(cfg)
    return cfg


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
