"""The table of sources: what every place in a row of edges stands for, over one step or several.

    per step     features and errors, in the order of `pullback.RowLayout`; with guidance by two branches per evaluation
    then         one step: the residual streams entering the first block, image and text; the latents too, if the
                 velocity is recorded, since an objective on the image depends on them directly
                 several: the text embedding, of two branches both, then the latents entering the first step
    last         outputs, which are targets and no sources

Places that fill a position's features up to K have value 0, and hence no edges. Errors and inputs have value 1: their
vectors are taken whole. Features of single-stream blocks count to the stream of their position.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from difffract_jax.address import IMG, LATENT, PROMPT, TXT
from difffract_jax.circuits.attribution.expansion import SourceTable
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.trace.capture import TraceInfo
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT

_DTYPES = (np.uint8, np.uint8, np.int16, np.int32, np.int32, np.float32, np.int16, np.uint8)
Columns = tuple[np.ndarray, ...]


def source_table(
    prepared: Sequence[Replacement], infos: Sequence[TraceInfo], *, across: bool = False, outputs: Sequence[int] = ()
) -> SourceTable:
    """Returns the table of one step, or of several.

    Args:
        prepared: replacements of the evaluations, in the order of `capture.Span`.
        infos: of their traces.
        across: whether images are carried back to the latents entering the first step.
        outputs: steps of the outputs that are targets.
    """
    parts = [row for one, info in zip(prepared, infos, strict=True) for row in _step_rows(one, info)]
    first, boundary = infos[0].step, prepared[0].record.boundary
    rows, text = boundary.img.shape[0], boundary.txt.shape[0]
    if across:
        branches = dict.fromkeys(info.branch for info in infos)
        parts += [_vectors(INPUT, TXT, -1, np.arange(text), first, branch) for branch in branches]
        parts.append(_vectors(INPUT, LATENT, -1, np.arange(rows), first))
    else:
        branch = infos[0].branch
        parts.append(_vectors(INPUT, IMG, -1, np.arange(rows), first, branch))
        parts.append(_vectors(INPUT, TXT, -1, np.arange(text), first, branch))
        if prepared[0].record.velocity is not None:
            parts.append(_vectors(INPUT, LATENT, -1, np.arange(rows), first))
    parts += [_vectors(OUTPUT, IMG, infos[0].layout.depth, np.array([-1]), step) for step in outputs]
    columns = zip(zip(*parts, strict=True), _DTYPES, strict=True)
    return SourceTable(*(np.concatenate(column, dtype=dtype, casting="unsafe") for column, dtype in columns))


def _step_rows(prepared: Replacement, info: TraceInfo) -> list[Columns]:
    """Returns the features and errors of one evaluation, in the order of a row of edges."""
    parts, layout = [], info.layout
    places = [layout.sequence(group, info.tokens_of) for group in range(len(layout.groups))]
    index = [_on_host(one.layers.index) for one in prepared.sites]
    value = [_on_host(one) for one in prepared.sources.values]
    for number in range(len(layout.stacks)):
        groups = layout.groups_of_stack(number)
        recorded = [block for block in info.recorded if block in layout.blocks_of_stack(number)]
        for layer, block in enumerate(recorded):
            parts += [_features(index[g][layer], value[g][layer], block, *places[g], info) for g in groups]
            for stream, position in (places[group] for group in groups):
                parts.append(_vectors(ERROR, stream, block, position, info.step, info.branch))
    return parts


def _on_host(array: Array) -> np.ndarray:
    """Returns an array's values; of an accelerator's a copy that JAX does not keep beside it, as it else does."""
    there = all(device.platform == "cpu" for device in array.devices())
    return np.asarray(array if there else jnp.copy(array))


def _features(
    index: np.ndarray,
    value: np.ndarray,
    block: int,
    stream: np.ndarray,
    position: np.ndarray,
    info: TraceInfo,
) -> Columns:
    """Returns the columns of one block's features of one group, from their numbers and values, [rows active]."""
    stream, position = (np.broadcast_to(column[:, None], index.shape).ravel() for column in (stream, position))
    codes = FEATURE, block, info.step, info.branch
    kind, blocks, steps, branches = (np.broadcast_to(code, index.size) for code in codes)
    return kind, stream, blocks, position, index.ravel(), value.ravel(), steps, branches


def _vectors(
    kind: int, stream: int | np.ndarray, block: int, position: np.ndarray, step: int, branch: int = PROMPT
) -> Columns:
    """Returns the columns of sources that are taken whole."""
    rows = position.size
    return (
        np.full(rows, kind),
        np.broadcast_to(stream, rows),
        np.full(rows, block),
        position,
        np.full(rows, -1),
        np.ones(rows),
        np.full(rows, step),
        np.full(rows, branch),
    )
