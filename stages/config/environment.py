"""The section `environment`: the versions of the libraries that results depend on.

Results of another version of a library are other results. The versions are therefore parameters: DVC keeps the results of
different versions apart, and a stage runs only where the versions that params.yaml names are installed.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from packaging.version import Version

from stages.schema import require


@dataclass(kw_only=True, slots=True)
class Environment:
    """Public versions, without a build such as +cpu."""

    torch: str
    transformers: str
    tokenizers: str
    datasets: str
    safetensors: str
    lm_eval: str


@cache
def installed(library: str) -> str:
    """The public version of a library, such as "2.13.0"; `library` is a field of Environment.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return Version(version(library.replace("_", "-"))).public


def require_installed(environment: Environment, libraries: list[str]) -> None:
    """Refuse to compute with other versions than params.yaml names.

    Raises:
        ConfigError: naming the library, the version found and the version wanted.
    """
    for library in libraries:
        wanted = getattr(environment, library)
        advice = f"{wanted}: install it, or compose anew with `dvc exp run`, or run with environment.{library}={installed(library)}"
        require(installed(library) == wanted, f"environment.{library}", f"{installed(library)} installed", advice)
