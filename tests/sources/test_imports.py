"""What the modules of the sources import: the base is fetched again only when its own code changes, and composition stays fast."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("stages.sources.base", {"stages.sources.text", "stages.sources.readers", "stages.config.sections"}),
        ("stages.sources.text", {"stages.sources.base", "stages.sources.decoder", "stages.checkpoint.reader", "stages.config.sections"}),
    ],
)
def test_a_source_imports_nothing_of_the_other_nor_a_library_that_only_fetching_needs(module, others):
    assert not imported_by(module) & (others | {"transformers", "datasets"})
