"""Transcoders of a run that has not finished: those of its newest good checkpoint, as the last step would make them.

The checkpoint is only read, onto one device, whatever mesh it was written from; a run may be going on meanwhile.
"""

from pathlib import Path
from typing import Any, NamedTuple

from difffract_jax.config import UserError
from difffract_jax.transcoders.checkpoints import newest, open_checkpoints, restore
from difffract_jax.transcoders.objective import Width
from difffract_jax.transcoders.setup import abstract_state, open_mesh, set_up
from difffract_jax.transcoders.sites import SiteSet, sites_in
from difffract_jax.transcoders.training import run_record, run_settings, transcoders_of
from difffract_jax.transcoders.transcoder import TranscoderSet


class Exported(NamedTuple):
    """Transcoders of a checkpoint.

    Attributes:
        transcoders: the set.
        step: steps that they were trained.
        record: their provenance: that of the run, and `step`.
        passed: newer checkpoints that could not be used, and why.
    """

    transcoders: TranscoderSet
    step: int
    record: dict[str, Any]
    passed: list[str]


def shape_of_run(run: Path) -> tuple[SiteSet, Width] | None:
    """Returns sites and width of a run as it wrote them down; None for a run of before releases did."""
    shape = run_record(run).get("shape")
    if shape is None:
        return None
    x, y = shape["width"]
    return sites_in(shape, "sites"), (x, y)


def newest_transcoders(run: str | Path, shape: tuple[SiteSet, Width] | None = None) -> Exported:
    """Returns the transcoders of a run's newest checkpoint that can be used.

    Args:
        run: directory of the run.
        shape: sites that it trains, and channels of its rows; if left out, as the run wrote them down.

    Raises:
        UserError: if it is not a run, or has no such checkpoint.
    """
    run = Path(run)
    record = run_record(run)
    if newest(run) < 0:
        raise UserError(f"The run in {run} has no checkpoint yet, so that there is nothing to export; let it go on.")
    known = shape or shape_of_run(run)
    if known is None:
        raise UserError(f"The run in {run} does not say its shape; export it with difffract train --export {run}.")
    sites, width = known
    alone = run_settings(run).model_copy(update={"mesh": "data=1", "parallel": "jit", "sparse_code": "off"})
    setup = set_up(alone, sites, width, open_mesh(alone))
    checkpoints = open_checkpoints(run, keep=None)
    try:
        restored = restore(checkpoints, {"state": abstract_state(setup)})
    finally:
        checkpoints.close()
    made = transcoders_of(restored.trees["state"], sites)
    return Exported(made, restored.step, {**record, "step": restored.step}, restored.passed)
