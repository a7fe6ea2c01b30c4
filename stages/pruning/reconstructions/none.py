"""No training: kept weights stay as the method left them."""

from stages.pruning.entries import NoParameters, Training

NONE = Training(
    name="none",
    parameters=NoParameters,
    summary="kept weights stay as the method left them",
)
