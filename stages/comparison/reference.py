"""The dense model's results, with which the pruned and the quantised models' are compared."""

from pathlib import Path

from stages.errors import ComparisonError
from stages.evaluation.protocol import Protocol, read_protocol, require_same
from stages.evaluation.results import Results, read_results

REMEDY = (
    "evaluate the dense model again with the same parameters: `python -m stages.evaluate part=dense …`, "
    "or `dvc repro --force --single-item evaluate_dense`"
)


def read_dense(directory: Path, protocol: Protocol) -> Results:
    """Read the dense model's results and check that they have the protocol by which another model is to be scored.

    Raises:
        ComparisonError: there are none, they are damaged, or their protocol is another; names the keys that differ.
    """
    details = directory / "details"
    try:
        dense = read_protocol(details / "protocol.json")
        results = read_results(details, dense)
    except ComparisonError as error:
        raise ComparisonError(f"{error}; {REMEDY}") from None
    require_same(dense, protocol, names=(str(directory), "this evaluation"), remedy=REMEDY)
    return results
