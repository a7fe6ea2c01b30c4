"""params.yaml as plain data, with the groups that the command line chooses.

params.yaml is data, never code: it holds no Hydra settings, no defaults list and no interpolation. Values and groups of the command
line replace its own:

    python -m stages.prune pattern.sparsity=0.6                   one value
    python -m stages.prune method=sparsegpt pattern=nm_2_4        sections, each as its file in conf/ has it
    python -m stages.prune experiment=best_50                     a named set of choices
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stages.errors import ConfigError
from stages.plain_yaml import require_bounded

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONF = Path(__file__).parents[2] / "conf"
PARAMS = Path("params.yaml")
NOT_PLAIN = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
)  # of a number of thousands of digits, of a key that is a list, of !!timestamp x
CHOSEN = "???"  # Hydra's word for a choice that the command line or an experiment makes


def read_params(path: Path) -> dict[str, Any]:
    """The sections of params.yaml, as plain data.

    Raises:
        ConfigError: the file is missing, is not a mapping, or holds what would be executed; names the key.
    """
    try:
        text = path.read_text(encoding="utf8")
        require_bounded(text)
        data = yaml.load(text, Loader=_PlainLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found, wanted in the current directory; `dvc exp run` writes it") from None
    except NOT_PLAIN as error:
        raise ConfigError(f"{path}: not plain YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}, wanted a mapping of sections")
    for key in ("hydra", "defaults"):
        if key in data:
            raise ConfigError(f"{path}: found the key {key!r}, wanted sections alone: it is read as data, never as code")
    refuse_interpolations(data, str(path))
    return data


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is there twice, and reads dates as the text that they are."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"found the key {twice!r} twice in one mapping, wanted it once")
        return super().construct_mapping(node, deep)


def refuse_interpolations(value: Any, where: str) -> None:
    """Raise ConfigError where a string holds an interpolation such as ${oc.env:NAME}, which could bring a secret into results."""
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_interpolations(key, where)
            refuse_interpolations(inner, f"{where}: {key}" if where.endswith("yaml") else f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            refuse_interpolations(inner, where)
    elif isinstance(value, str) and ("${" in value or value == CHOSEN):
        raise ConfigError(f"{where}: found {value!r}, wanted a plain value")


def prepare(arguments: list[str]) -> None:
    """Put params.yaml into Hydra's store as the config `params`, ready for the groups that the arguments choose.

    Args:
        arguments: of the command line: overrides, and flags of Hydra.

    Raises:
        ConfigError: see read_params; an override that is no override, or holds an interpolation.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError("command line: found --multirun, wanted one run: every run writes the same files; use `dvc exp run --queue`")
    texts = [text for text in arguments if not text.startswith("-") and ("=" in text or text.startswith("~"))]
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except OverrideParseException as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from None
    refuse_interpolations(texts, "command line")
    ConfigStore.instance().store(name="params", node=_with_choices(read_params(PARAMS), overrides))


def _with_choices(params: dict[str, Any], overrides: "list[Override]") -> dict[str, Any]:
    """params without the sections that are chosen, and a defaults list in which Hydra finds the choices."""
    groups = [override.key_or_group for override in overrides if (CONF / override.key_or_group).is_dir()]
    experiments = [override.value() for override in overrides if override.key_or_group == "experiment"]
    for experiment in experiments:
        groups += [group for group in _overridden_by(CONF / "experiment" / f"{experiment}.yaml") if group not in groups]
    groups = [group for group in groups if group.rpartition("/")[0] not in groups]  # a part of a section that is chosen whole
    groups.sort(key=lambda group: group == "experiment")  # last: it overrides the others
    for group in groups:
        *path, last = group.split("/")
        section: Any = params
        for name in path:
            section = section.get(name) or {}
            if not isinstance(section, dict):
                raise ConfigError(f"{PARAMS}: {name}: found {section!r}, wanted a section of keys")
        section.pop(last, None)
        if isinstance(params.get("text"), dict) and group in params["text"]:
            params["text"][group] = {}  # the section chosen brings the corpora that it names
    return {"defaults": ["_self_", *({group: CHOSEN} for group in groups)], **params}


def _overridden_by(experiment: Path) -> list[str]:
    """The groups that an experiment chooses; none where there is no such file, which Hydra then says."""
    if not experiment.is_file():
        return []
    defaults = yaml.safe_load(experiment.read_text(encoding="utf8")).get("defaults", [])
    keys = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    return [key.removeprefix("override ").strip().lstrip("/") for key in keys if key.startswith("override ")]
