"""The Hydra entry point: hands a stage its sections of params.yaml."""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, Protocol

import hydra
from omegaconf import DictConfig

from stages.config.caching import require_room_in_cache
from stages.config.environment import require_installed
from stages.config.params import CONF, prepare
from stages.errors import SparsesweepError
from stages.schema import require_one_of

log = logging.getLogger(__name__)
LIBRARY = "environment."


class Stage(Protocol):
    """A command, the function behind it, and by part the parameters that DVC tracks for it."""

    function: Callable[..., None]
    parameters: dict[str, tuple[str, ...]]

    def __call__(self) -> None: ...


def stage(*parameters: str, parts: dict[str, tuple[str, ...]] | None = None) -> Callable[[Callable[..., None]], Stage]:
    """Make a function a command that is handed only the sections that DVC tracks for it.

    Every section is checked, so that a bad value stops the first stage that runs, but only these are passed on.

    Args:
        parameters: names of sections, passed as keyword arguments, or of keys of them, "SECTION.KEY", passed as SECTION_KEY; and
            "environment.LIBRARY" for every library whose version the results depend on, which must be the one installed.
        parts: for a stage that dvc.yaml runs in parts (`python -m stages.fetch part=base`), the parameters of each; the part's
            name is passed as `part`.
    """

    def wrap(function: Callable[..., None]) -> Stage:
        def task(cfg: DictConfig) -> None:
            try:
                _run(cfg, function, parameters, parts)
            except SparsesweepError as error:
                log.error("%s: %s", type(error).__name__, error)
                sys.exit(1)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.error(
                    "the memory of this machine does not suffice (%s); what is finished is kept", str(error).split("\n")[0] or "MemoryError"
                )
                sys.exit(1)

        run = hydra.main(version_base="1.3", config_path=str(CONF), config_name="stage")(task)

        def main() -> None:
            importlib.import_module("stages.config.sections").register()
            try:
                prepare(sys.argv[1:])
            except SparsesweepError as error:  # before Hydra has set up the log
                print(f"{type(error).__name__}: {error}")
                sys.exit(1)
            run()

        command: Any = main
        command.parameters = parts or {"": parameters}
        command.function = function
        return command

    return wrap


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error means that the system gave no memory; torch says so in its message alone."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _run(cfg: DictConfig, function: Callable[..., None], parameters: tuple[str, ...], parts: dict[str, tuple[str, ...]] | None) -> None:
    sections = importlib.import_module("stages.config.sections").read(cfg)
    keywords: dict[str, Any] = {}
    if parts is not None:
        require_one_of("part", cfg.part, list(parts))
        parameters, keywords = parts[cfg.part], {"part": cfg.part}
    libraries = [name.removeprefix(LIBRARY) for name in parameters if name.startswith(LIBRARY)]
    require_installed(sections["environment"], libraries)
    for name in parameters:
        if not name.startswith(LIBRARY):
            section, _, key = name.partition(".")
            keywords[name.replace(".", "_")] = getattr(sections[section], key) if key else sections[section]
    function(**keywords)
    require_room_in_cache()
