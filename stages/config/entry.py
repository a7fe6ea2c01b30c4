"""The Hydra entry point: hands a stage its sections of params.yaml.

A stage that has nothing to do ends before anything is imported that takes time: see Idle.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stages.config.caching import require_room_in_cache
from stages.config.environment import require_installed
from stages.config.params import CONF, PARAMS, prepare, read_params
from stages.errors import SparsesweepError
from stages.schema import require_one_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
LIBRARY = "environment."


class Idle(NamedTuple):
    """When a stage has nothing to do, and what it does then.

    key: of params.yaml, such as "publish.dtype". value: of that key. record: writes the stage's results, which say so.
    others: the other keys of its section, where no other stage reads the section and would refuse a key that is misspelled; else None.
    """

    key: str
    value: Any
    record: Callable[[], None]
    others: frozenset[str] | None = None

    def is_now(self) -> bool:
        """Whether params.yaml as it stands says so; where it is otherwise in any way, all of it is read and checked as ever."""
        *path, last = self.key.split(".")
        try:
            section: Any = read_params(PARAMS)
            for name in path:
                section = section[name]
            value, others = section[last], section.keys() - {last}
        except (SparsesweepError, LookupError, TypeError, AttributeError):
            return False
        return value == self.value and type(value) is type(self.value) and self.others in (None, others)


class Stage(Protocol):
    """A command, the function behind it, and by part the parameters that DVC tracks for it."""

    function: Callable[..., None]
    parameters: dict[str, tuple[str, ...]]

    def __call__(self) -> None: ...


def stage(
    *parameters: str, parts: dict[str, tuple[str, ...]] | None = None, idle: Idle | None = None
) -> Callable[[Callable[..., None]], Stage]:
    """Make a function a command that is handed only the sections that DVC tracks for it.

    Every section is checked, so that a bad value stops the first stage that has something to do, but only these are passed on.

    Args:
        parameters: names of sections, passed as keyword arguments, or of keys of them, "SECTION.KEY", passed as SECTION_KEY; and
            "environment.LIBRARY" for every library whose version the results depend on, which must be the one installed.
        parts: for a stage that dvc.yaml runs in parts (`python -m stages.fetch part=base`), the parameters of each; the part's
            name is passed as `part`.
        idle: when the stage has nothing to do. Without arguments it then checks no values: they are checked as soon as a stage reads them.
    """

    def wrap(function: Callable[..., None]) -> Stage:
        def task(cfg: "DictConfig") -> None:
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

        def main() -> None:
            try:
                if idle is not None and not sys.argv[1:] and idle.is_now():
                    idle.record()
                    require_room_in_cache()
                    print(f"{idle.key} = {'null' if idle.value is None else idle.value}: nothing to do")
                    return
                import hydra

                importlib.import_module("stages.config.sections").register()
                prepare(sys.argv[1:])
            except SparsesweepError as error:  # before Hydra has set up the log
                print(f"{type(error).__name__}: {error}")
                sys.exit(1)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="stage")(task)()

        command: Any = main
        command.parameters = parts or {"": parameters}
        command.function = function
        return command

    return wrap


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error means that the system gave no memory; torch says so in its message alone."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _run(cfg: "DictConfig", function: Callable[..., None], parameters: tuple[str, ...], parts: dict[str, tuple[str, ...]] | None) -> None:
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
