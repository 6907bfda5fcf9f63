"""Training from Python: on rows of your own in one call, or on any source with all settings.

made = train(rows=(x, y), out="run", steps=2000)              arrays
made = train(rows=lambda: batches(), out="run", k=16)         batches, made anew for every epoch
made = train(rows="directory", out="run")                     files, see `arrays`
made = train(settings, source, record, watch)                 what `difffract train` calls
"""

import logging
from collections.abc import Mapping
from typing import Any

from difffract_jax.config import UserError, provenance, resolve
from difffract_jax.transcoders import training
from difffract_jax.transcoders.defaults import choose
from difffract_jax.transcoders.harvest import RowSource
from difffract_jax.transcoders.own_rows import rows_of
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.training import Trained, Watch


def train(
    settings: TrainConfig | None = None,
    source: RowSource | None = None,
    record: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    *,
    rows: Any = None,
    resume: bool = False,
    **choices: Any,
) -> Trained:
    """Trains transcoders on rows; see the module for its forms.

    Args:
        settings: of the run; if left out, they are made of `choices` and of defaults that suit the rows.
        source: where rows come from; or give `rows`.
        record: settings, versions and sources, for the files that the run writes; made if left out.
        watch: who is told; if left out, notes go to the log.
        rows: a directory, arrays, or batches, see `own_rows.rows_of`. x [rows, d_model] is what the transcoder reads, y
            [rows, d_model_out] what it shall return, t [rows] the time in [0, 1]; floating-point numbers.
        resume: go on with the run in `out`; batches must come as they came before.
        choices: settings by name, as `out`, `steps`, `k`, `batch`; without `settings` alone.

    Returns:
        How the run ended: its steps, its metrics, and the transcoders, for `save_transcoders`.

    Raises:
        UserError: if rows or settings do not fit, or the loss ceases to be finite.
    """
    if (rows is None) == (source is None):
        raise UserError("Training needs rows: give either `rows` or a `source`.")
    if settings is not None and choices:
        raise UserError(f"{', '.join(choices)}: choices and `settings` exclude each other; change the settings.")
    directory = {"rows": str(rows)} if isinstance(rows, str) or hasattr(rows, "__fspath__") else {}
    made = settings or resolve(TrainConfig, choices | directory)
    timed = True
    if source is None:
        source = rows_of(rows, "train", made.validation_share, made.seed, sae=made.role == "sae")
        timed = source.timed
    if settings is None:
        made, _ = choose(made, source.width, timed=timed)
    written = record or provenance("train", made, rows=directory.get("rows", "Python"))
    log = logging.getLogger(__name__)
    return training.train(made, source, written, watch or Watch(lambda *_: None, log.warning), resume=resume)
