"""No training: kept weights stay as the method left them."""

from stages.pruning.entries import NoParameters, Training

NONE = Training(
    name="none",
    each_block=lambda _: None,
    last_blocks=lambda *_: None,
    label="",
    parameters=NoParameters,
    summary="kept weights stay as the method left them",
)
