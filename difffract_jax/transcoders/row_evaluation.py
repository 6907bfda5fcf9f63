"""How faithful transcoders are on rows alone, where there is no model to put them into: FVU, cosine, L0, dead features.

The same measures as `evaluation` takes of a model's rows, sorted by denoising time: by the times that occur, or where
these are many, into `BINS` equal parts of [0, 1]. Nothing can be said of velocity or images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.transcoders.arrays import width_text
from difffract_jax.transcoders.evaluation import Evaluation, Sums, densities, row_sums, tables_of
from difffract_jax.transcoders.own_rows import ArrayRows, rows_of
from difffract_jax.transcoders.processes import divided
from difffract_jax.transcoders.sites import ROWS
from difffract_jax.transcoders.store import StoredRows
from difffract_jax.transcoders.transcoder import TranscoderSet

BINS = 8
"""Parts of [0, 1] that times are sorted into, where more than this many occur."""


def evaluate_rows(
    tcs: TranscoderSet, rows: Any, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Measures the transcoder of foreign rows on such rows.

    Args:
        tcs: a set with the one site rows/0.
        rows: to measure on, each once: a split from `own_rows.open_rows`, or a directory, or arrays as a pair (x, y), a
            triple (x, y, t) or a mapping.
        progress: called with (blocks done, blocks in all).

    Raises:
        UserError: if the set is of other sites or widths.
    """
    if ROWS.name not in tcs.stacks:
        raise UserError("These transcoders are of a model's sites, not of rows; measure them on their model.")
    if not isinstance(rows, ArrayRows | StoredRows):
        rows = rows_of(rows, None, 0.0, 0, sae=tcs.config.role == "sae")
    if isinstance(rows, StoredRows):
        raise UserError("These rows were harvested from a model's sites; give arrays, or a directory of them.")
    if not isinstance(rows, ArrayRows):
        raise UserError("Rows are measured on each once; give arrays or a directory of them.")
    width = tcs.config.d_model, tcs.config.d_model_out
    if rows.width != width:
        raise UserError(
            f"The rows are {width_text(rows.width)} channels wide, but the transcoder {width_text(width)}; give rows "
            "of the source that it was trained on."
        )
    times, sums = times_of(rows), None

    def sums_of(number: int) -> Sums:
        chunk = rows.chunk(number)
        valid = jnp.asarray(chunk.valid[ROWS.name])
        return row_sums(tcs.stacks[ROWS.name], chunk.rows[ROWS.name], valid, jnp.asarray(times, jnp.float32))

    for done, more in enumerate(divided(len(rows.blocks), sums_of), 1):
        sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
        progress(done, len(rows.blocks))
    assert isinstance(sums, Sums)  # a split has blocks
    by_group = {ROWS.name: sums}
    tables = tables_of(tcs.sites, by_group, times)
    return Evaluation(tcs.config.role, times, *tables, [], [], [], [], densities(tcs.sites, by_group))


def times_of(rows: ArrayRows) -> list[float]:
    """Returns the times that rows are sorted by: those that occur, or the middles of `BINS` equal parts."""
    if not rows.timed:
        return [0.0]
    occurring: set[float] = set()
    for block in rows.blocks:
        t = rows.shards[block.shard].t
        assert t is not None  # all shards have times, or none
        occurring |= set(np.unique(np.asarray(t[block.begin : block.end]).astype(np.float32)).tolist())
        if len(occurring) > BINS:
            return [(place + 0.5) / BINS for place in reversed(range(BINS))]
    return sorted(occurring, reverse=True)
