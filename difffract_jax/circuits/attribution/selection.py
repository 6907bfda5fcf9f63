"""From a feature as written to its row of the source table: where it is strongest, or why it cannot be a target."""

import numpy as np
from jaxtyping import Float64

from difffract_jax.address import BRANCHES, STREAMS
from difffract_jax.circuits.attribution.engine import Engine, make_engine
from difffract_jax.circuits.frozen.replacement import Prepared
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import Span, Trace, TraceInfo, main_info
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.transcoders.transcoder import TranscoderSet


def strongest_feature(trace: Trace | Span | Prepared, tcs: TranscoderSet, stream: str, block: int) -> Feature:
    """Returns the feature with the largest value at one site, at the position where it has it.

    Args:
        trace: from `capture`, `capture_steps` or `prepare`; of a span, its last step counts.
        tcs: the transcoders it was captured for.
        stream: label of the site, as in img/3 or single/0.
        block: its number.

    Raises:
        UserError: if nothing is active there.
    """
    engine = make_engine(trace, tcs)
    info = engine.info
    rows = np.flatnonzero(_at_site(engine, Feature(stream, block, 0), info))
    if not rows.size:
        raise UserError(f"No feature is active at {stream}/{block} in step {info.step}; choose another site.")
    return named(engine, int(rows[np.argmax(engine.table.value[rows])]))


def named(engine: Engine, row: int) -> Feature:
    """Returns a row of the table as a feature with its position, and its step if there are several."""
    table, layout = engine.table, engine.infos[0].layout
    block, stream = int(table.block[row]), int(table.stream[row])
    position, steps = (int(table.position[row]),), (int(table.step[row]),) if engine.across else None
    site_of = layout.site_number(block, stream)
    branch = BRANCHES[table.branch[row]] if engine.info.branches > 1 else None
    return Feature(*site_of, int(table.feature[row]), position, steps, layout.side(block, stream), branch)


def _at_site(engine: Engine, target: Feature, info: TraceInfo) -> np.ndarray:
    """Marks the active rows of a site in an evaluation; of one of several streams, those of the stream named."""
    table, layout = engine.table, engine.infos[0].layout
    streams = layout.streams_of(target.stream) if target.side is None else (target.side,)
    active = (table.kind == FEATURE) & (table.value > 0) & (table.step == info.step) & (table.branch == info.branch)
    of_stream = np.isin(table.stream, [STREAMS.index(stream) for stream in streams])
    return active & of_stream & (table.block == layout.block_of(target.stream, target.block))


def target_row(engine: Engine, target: Feature) -> int:
    """Returns the row of a feature at its position, step and branch.

    Args:
        engine: of the trace.
        target: the feature; without positions, or with several, the one where it is strongest is taken; without a step,
            the last one traced; without a branch, the prompt's if it is traced.

    Raises:
        UserError: if there is no such feature, or it is active nowhere it may be; the message says where it is.
    """
    info = _step_of(engine, target)
    table = engine.table
    _check_site(engine, info, target)
    rows = np.flatnonzero(_at_site(engine, target, info) & (table.feature == target.feature))
    wanted = rows if target.positions is None else rows[np.isin(table.position[rows], target.positions)]
    if wanted.size:
        return int(wanted[np.argmax(table.value[wanted])])
    if rows.size:
        strongest = rows[np.argsort(-table.value[rows], kind="stable")][:12]
        places = ", ".join(f"{table.position[r]} ({table.value[r]:.3g})" for r in strongest)
        raise UserError(
            f"{target} is inactive there; it is active at the positions (values): {places}"
            f"{' and others' if rows.size > strongest.size else ''}; name one of them."
        )
    raise UserError(_inactive_everywhere(engine, info, target))


def _step_of(engine: Engine, target: Feature) -> TraceInfo:
    """Returns the evaluation in which a target is meant."""
    branches = dict.fromkeys(BRANCHES[info.branch] for info in engine.infos)
    if target.branch is not None and target.branch not in branches:
        raise UserError(
            f"{target} is asked for in the branch {target.branch}, but what is traced is {' and '.join(branches)}; "
            "change one of them."
        )
    infos = [info for info in engine.infos if target.branch in (None, BRANCHES[info.branch])]
    if target.steps is None:
        return main_info(infos)
    found = [info for info in infos if info.step in target.steps]
    if not found:
        steps = ", ".join(map(str, dict.fromkeys(info.step for info in engine.infos)))
        raise UserError(
            f"{target} is asked for at other steps than the traced one{'s' if engine.across else ''}, {steps}; "
            "change one of them."
        )
    return main_info(found)


def _check_site(engine: Engine, info: TraceInfo, target: Feature) -> None:
    """Refuses a target without a transcoder, feature or position of that number, or on padding."""
    numbers, layout = _live_sites(engine, info, target.stream), info.layout
    if target.block not in numbers:
        known = ", ".join(map(str, numbers)) or "none"
        raise UserError(f"There is no transcoder at {target.stream}/{target.block}; blocks with one: {known}.")
    group, record = layout.group_of(target.stream, target.block), engine.steps[engine.infos.index(info)].record
    features = engine.steps[0].sites[group].features
    if target.feature >= features:
        raise UserError(f"{target} does not exist: the transcoders have features 0 to {features - 1}.")
    side = STREAMS.index(target.side or layout.streams_of(target.stream)[-1])
    replaceable = np.asarray(record.replaceable[group])[layout.sequence(group, info.tokens_of)[0] == side]
    asked = np.array([] if target.positions is None else target.positions, int)
    beyond = asked[asked >= replaceable.size]
    if beyond.size:
        raise UserError(
            f"{target} names position {beyond[0]}, but the stream has positions 0 to {replaceable.size - 1}."
        )
    if asked.size and not replaceable[asked].any():
        raise UserError(
            f"{target} lies on padding, where transcoders are not used; name one of the prompt's own tokens, "
            f"0 to {int(np.flatnonzero(replaceable)[-1])}, or trace with include_padding."
        )


def _live_sites(engine: Engine, info: TraceInfo, label: str) -> list[int]:
    """Returns the numbers of a label's sites that have a transcoder and were recorded."""
    numbers = []
    for group, sites in enumerate(engine.steps[0].sites):
        if sites.stack is None or info.layout.groups[group].label != label:
            continue
        recorded = [block for block in info.recorded if block in info.layout.blocks_of(group)]
        live = np.asarray(sites.layers.live)
        blocks = info.layout.labels[label]
        numbers += [blocks.index(block) for block, row in zip(recorded, live, strict=True) if row.any()]
    return numbers


def _inactive_everywhere(engine: Engine, info: TraceInfo, target: Feature) -> str:
    """Says how far an inactive feature is from being active, and which features of its site are."""
    u = site_preactivations(engine, info, target)
    group = info.layout.group_of(target.stream, target.block)
    if target.side is not None:
        of_side = info.layout.sequence(group, info.tokens_of)[0] == STREAMS.index(target.side)
        u = np.where(of_side, u, -np.inf)
    best, table = int(np.argmax(u)), engine.table
    place = info.layout.place(group, best, info.tokens_of)
    here = np.flatnonzero(_at_site(engine, target, info))
    order = here[np.argsort(-table.value[here], kind="stable")]
    examples = dict.fromkeys(str(named(engine, int(r))).rpartition("/")[2] for r in order[:5])
    return (
        f"{target} is inactive at every position of step {info.step}: it comes closest at position {place}, where its "
        f"pre-activation is {u[best]:.3g}, too little to be active. Strongest at this site: {', '.join(examples)}."
    )


def site_preactivations(engine: Engine, info: TraceInfo, target: Feature) -> Float64[np.ndarray, "rows"]:
    """Returns a feature's pre-activation u at every row of its sequence; minus infinity where the MLP is not replaced.

    Args:
        engine: of the trace.
        info: of the step.
        target: the feature.
    """
    group = info.layout.group_of(target.stream, target.block)
    prepared = engine.steps[engine.infos.index(info)]
    block = info.layout.block_of(target.stream, target.block)
    layer = block - info.recorded[0] - prepared.record.first_layers[group]
    sites = prepared.sites[group]
    transcoder = sites.transcoder(sites.layers.slot[layer])
    u = transcoder.preactivation(prepared.record.mlp_in[group][layer], prepared.record.t)[:, target.feature]
    return np.where(np.asarray(sites.layers.live[layer]), np.asarray(u, np.float64), -np.inf)
