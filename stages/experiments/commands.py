"""The command line that runs an experiment again, from its params.yaml."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.config import sections
from stages.config.compose import composed
from stages.config.params import CONF
from stages.experiments.reading import EVALUATION

PLAIN, QUOTED = re.compile(r"[A-Za-z_][\w./-]*"), "'{}'"  # strings that Hydra reads as such without quotes
WORDS = ("null", "true", "false", "nan", "inf")  # of which it makes something else
GROUPS = (
    "base",
    "calibration",
    "evaluation",
    "method",
    "pattern",
    "allocation",
    "reconstruction",
    "prune",
    "ruler",
    "publish",
)  # as they stand


def command(params: dict[str, Any], *, published: bool = True) -> str | None:
    """The `dvc exp run` line that composes these sections.

    Each group has the option from which its section differs in the fewest values; those follow as values of their own. Versions of
    libraries are those that are installed where the line is run.

    Args:
        params: the sections of params.yaml. published: whether the line goes on to a release.

    Returns:
        The line; None if conf/ has changed, so that no line does.
    """
    chosen = overrides(params)
    if chosen is None:
        return None
    return " ".join(["dvc exp run", *(f"-S {shlex.quote(override)}" for override in chosen), *([] if published else [EVALUATION])])


def overrides(params: dict[str, Any]) -> list[str] | None:
    """What the command line overrides; None: nothing composes these sections."""
    chosen: list[str] = []
    default = _composed(())
    if "publish" in params:  # of a version that lacked a key of it: how a model is published changes no score
        params = {**params, "publish": {**default["publish"], **params["publish"]}}
    for group in GROUPS:
        if group not in params:
            return None
        wanted, got = leaves(params[group]), leaves(default[group])
        if wanted == got:
            continue
        option, got = _nearest(group, wanted, got)
        chosen += [f"{group}={option}"] if option else []
        for part in sorted(path.name for path in (CONF / group).iterdir() if path.is_dir() and path.name in params[group]):
            of_part, own = _part(wanted, part), _part(got, part)
            if of_part.keys() != own.keys() or of_part.get("name") != own.get("name"):
                option, own = _nearest(f"{group}/{part}", of_part, own)
                chosen += [f"{group}/{part}={option}"] if option else []
                got = {key: value for key, value in got.items() if not key.startswith(f"{part}.")}
                got |= {f"{part}.{key}": value for key, value in own.items()}
        chosen += _values(group, wanted, got)
    made = _composed_or_none(tuple(chosen))
    if made is not None and "text" in params:  # evaluation and calibration bring their texts
        chosen += _values("text", leaves(params["text"]), leaves(made["text"]))
        made = _composed_or_none(tuple(chosen))
    same = made is not None and all(made[group] == params[group] for group in (*GROUPS, "text"))
    return chosen if same else None


def _nearest(group: str, wanted: dict[str, Any], default: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The option of a group whose section differs in the fewest values, and these; None and the default's if that is no worse.

    An option that a value is named like is composed before the others, which need not be where it has all values.
    """
    named = {value for value in wanted.values() if isinstance(value, str)}
    nearest: tuple[str | None, dict[str, Any]] = (None, default)
    for option in sorted((path.stem for path in (CONF / group).glob("*.yaml")), key=lambda stem: (stem not in named, stem)):
        fewest = len(_differing(wanted, nearest[1]))
        if not fewest:
            break
        values = _option(group, option)
        if len(_differing(wanted, values)) < fewest:
            nearest = option, values
    return nearest


@cache
def _option(group: str, option: str) -> dict[str, Any]:
    """The values of an option's section, by dotted key; "???" where the user states one."""
    sections.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made: Any = OmegaConf.to_container(compose(overrides=[f"+{group}={option}"]), resolve=True)
    for name in group.split("/"):
        made = made[name]
    return leaves(made)


@cache
def _composed(chosen: tuple[str, ...]) -> dict[str, Any]:
    """The sections that overrides compose, as plain data."""
    made: Any = OmegaConf.to_container(composed(*chosen))
    return made


def _composed_or_none(chosen: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        return _composed(chosen)
    except (HydraException, OmegaConfBaseException):
        return None


def _part(section: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of a part of a section, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in section.items() if key.startswith(f"{name}.")}


def leaves(section: Any) -> dict[str, Any]:
    """Dotted key -> value; a list is a value."""
    return dict(_walk(section, ""))


def _walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _differing(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    return [key for key in wanted.keys() | got.keys() if key not in wanted or key not in got or wanted[key] != got[key]]


def _values(group: str, wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Overrides of single values."""
    return [f"{group}.{key}={in_grammar(value)}" for key, value in wanted.items() if key not in got or got[key] != value]


def in_grammar(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in WORDS else QUOTED.format(value.replace("'", "\\'"))
    if isinstance(value, list):
        return f"[{','.join(map(in_grammar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{in_grammar(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)
