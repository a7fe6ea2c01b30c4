"""Send runs to Weights & Biases: one run each, in one project.

Parameters are the run's config and metrics its summary, nested: W&B shows their keys dotted, such as corpora.wikipedia.perplexity.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, SparsesweepError
from stages.experiments.exporting import Run, cut

ID = 32  # characters of the result's hash; W&B takes 64
TAG = 64  # characters that W&B takes
GROUP = 12  # characters of the protocol's hash


def send(wandb: Any, sent: list[Run], *, to: str | None, project: str, online: bool) -> Iterator[str]:
    """Send runs; one that is there already is written again with the same values, since its id is made of its result.

    Args:
        wandb: the client, see `client`. to: the directory in which it makes its own, wandb/; None: the client's own choice, which
            WANDB_DIR sets. project: made if it is not there. online: whether to upload at once, with the key that the client itself
            finds; otherwise `wandb sync` uploads what lies in the directory.

    Yields:
        A line for each run: where it is.

    Raises:
        ConfigError: `to` is no directory. SparsesweepError: W&B refuses; with its words.
    """
    if to is not None:
        _make(to)
    for run in sent:
        try:
            with _started(wandb, run, to=to, project=project, online=online) as written:
                written.summary.update(run.metrics)
        except wandb.Error as error:
            raise SparsesweepError(f"W&B refused {run.name}: {error}") from error
        yield f"{run.name}: sent, as run {written.id} in {written.url if online else written.settings.sync_dir}"


def _started(wandb: Any, run: Run, *, to: str | None, project: str, online: bool) -> Any:
    # What W&B records of a process by itself is of this one, not of the one that pruned.
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    return wandb.init(
        id=run.result[:ID],
        name=run.name,
        project=project,
        dir=to,
        mode="online" if online else "offline",
        resume="allow",
        reinit="create_new",
        config={**run.params, "experiment": run.facts},
        tags=[cut(run.facts[name], TAG) for name in ("method", "pattern")],
        group=f"protocol {run.facts['protocol'][:GROUP]}",
        notes=run.command,
        settings=settings,
    )


def _make(to: str) -> None:
    if "://" in to:
        raise ConfigError(f"--to: found {to}, wanted a directory; WANDB_BASE_URL and --online send to a server")
    if Path(to).is_file():
        raise ConfigError(f"--to: found the file {to}, wanted a directory")
    Path(to).mkdir(parents=True, exist_ok=True)
