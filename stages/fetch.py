"""Fetch the base checkpoint, the text that calibration and evaluation read, or the tasks that lm-eval knows by their own names.

python -m stages.fetch part=base|text|tasks

Each part imports only its own module, so that after an edit of a reader the base is not fetched again.
"""

import logging
from typing import Any

from stages.config.entry import stage
from stages.files import BASE, BENCHMARKS, TEXT, replacing

log = logging.getLogger(__name__)


TASKS = ("evaluation.tasks", "text.evaluation", "environment.datasets", "environment.lm_eval")


@stage(parts={"base": ("base",), "text": ("text",), "tasks": TASKS})
def main(part: str, base: Any = None, text: Any = None, evaluation_tasks: Any = None, text_evaluation: Any = None) -> None:
    match part:
        case "base":
            fetch_base(base)
        case "text":
            fetch_text(text)
        case _:
            fetch_tasks(evaluation_tasks, text_evaluation)


def fetch_base(base: Any) -> None:
    """Write artifacts/base.

    Args:
        base: the section, one of the dataclasses in stages/sources/base.py.
    """
    from stages.sources.base import fetch

    with replacing(BASE) as directory:
        provenance = fetch(base, directory, downloads=BASE.with_name("base-downloads"))
    log.info("wrote %s: %s, fingerprint %s", BASE, provenance["name"], provenance["fingerprint"][:12])


def fetch_text(text: Any) -> None:
    """Write artifacts/text.

    Args:
        text: the section, the dataclass Text in stages/sources/text.py.
    """
    from stages.sources.text import fetch

    with replacing(TEXT) as directory:
        provenance = fetch(text, directory, downloads=TEXT.with_name("text-downloads"))
    log.info("wrote %s: %d files", TEXT, len(provenance["files"]))


def fetch_tasks(names: list[str], embedded: dict[str, Any]) -> None:
    """Write artifacts/tasks.

    Args:
        names: evaluation.tasks. embedded: text.evaluation; a task whose rows it names is not fetched here.
    """
    from stages.evaluation.manifest import write_manifest
    from stages.evaluation.tasks import is_embedded

    asked = [name for name in names if not is_embedded(name, embedded)]
    with replacing(BENCHMARKS) as directory:
        if asked:
            from stages.sources.tasks import fetch

            benchmarks = fetch(asked, directory, downloads=BENCHMARKS.with_name("tasks-downloads"))
            log.info("wrote %s: %s", BENCHMARKS, ", ".join(benchmarks))
        else:
            write_manifest(directory, {}, [])
            log.info("wrote %s: no task is asked for whose rows are not in text.evaluation", BENCHMARKS)


if __name__ == "__main__":
    main()
