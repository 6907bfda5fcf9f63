"""The laws of traced steps, to hold any kind of model to: edges add up, and are direct interventions."""

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.address import LATENT, PROMPT, TXT
from difffract_jax.circuits.attribution.engine import affine_constants, pull_rows, read_targets
from difffract_jax.circuits.attribution.pullback import pull_back
from difffract_jax.circuits.attribution.sources import source_table
from difffract_jax.circuits.frozen.replacement import run_replacement
from difffract_jax.circuits.frozen.targets import Targets, preactivations
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT

RUN_REPLACEMENT = jax.jit(run_replacement)
PROJECT = jax.jit(lambda projection, rows: projection(rows))


def some_targets(trace, tcs):
    """Features at two positions of every site."""
    layout, rows = trace.info.layout, []
    for group, slots in enumerate(tcs.sites.slots(layout)):
        for block in slots:
            last = trace.record.mlp_in[group].shape[1] - 1
            rows += [(group, block - trace.info.recorded[0], row, 3 + row) for row in (1, last)]
    return jax.device_put(Targets(*(np.array(column, np.int32) for column in zip(*rows, strict=True))))


def twice(array, place):
    """An array with what lies at a place doubled; by NumPy, which compiles no program for each place."""
    changed = np.array(array)
    changed[place] *= 2
    return jax.device_put(changed)


def conservation(trace, tcs, prepared):
    """Largest of |sum of edges + bias - pre-activation| over the sum of absolute edges."""
    targets = some_targets(trace, tcs)
    edges = np.asarray(pull_back(prepared, targets), np.float64)
    u = preactivations(prepared, targets, trace.record.mlp_in)
    constant = affine_constants((prepared,), (trace.info,), across=False)[0].mlp_in
    residual = np.abs(edges.sum(axis=1) + np.asarray(preactivations(prepared, targets, constant) - u, np.float64))
    return np.max(residual / np.abs(edges).sum(axis=1))


def intervention_error(trace, tcs, prepared, groups):
    """Largest difference of an edge and the effect of doubling its source, over the target's sum of absolute edges.

    Sources of so many groups of sites are among those doubled.
    """
    differences, edges = doubled_sources(trace, tcs, prepared, groups)
    return float(np.max(differences / np.abs(edges).sum(axis=1)))


def doubled_sources(trace, tcs, prepared, groups):
    """Differences [source, target] of edges and the effects of doubling 24 sources, and all edges."""
    targets, sources = some_targets(trace, tcs), prepared.sources
    edges, table = np.asarray(pull_back(prepared, targets)), source_table((prepared,), (trace.info,))
    before = preactivations(prepared, targets, RUN_REPLACEMENT(*prepared).mlp_in)
    rows = np.flatnonzero(np.isin(table.kind, (FEATURE, ERROR)) & (table.value > 0))
    differences, seen = [], set()
    for row in np.random.default_rng(0).choice(rows, 24):
        group = int(trace.info.layout.groups_at(table.block[row], table.stream[row]))
        layer = int(table.block[row]) - trace.info.recorded[0] - prepared.record.first_layers[group]
        at = int(trace.info.layout.rows_at(group, table.stream[row], table.position[row], trace.info.tokens_of))
        field, place = "errors", (layer, at)
        if table.kind[row] == FEATURE:
            index = np.asarray(prepared.sites[group].layers.index[layer, at])
            field, place = "values", (layer, at, int(np.flatnonzero(index == table.feature[row])[0]))
        changed = [twice(v, place) if i == group else v for i, v in enumerate(getattr(sources, field))]
        given = (*prepared[:2], sources._replace(**{field: tuple(changed)}))
        after = preactivations(prepared, targets, RUN_REPLACEMENT(*given).mlp_in)
        differences.append(np.abs((after - before) - edges[:, row]))
        seen.add(group)
    assert len(seen) == groups
    return np.stack(differences), edges


def last_targets(engine):
    """Rows of a feature of every group of sites in the last step, in each of its branches, and of the first output."""
    table, last = engine.table, engine.infos[-1].step
    layout, rows = engine.infos[0].layout, []
    feature = (table.kind == FEATURE) & (table.step == last) & (table.value > 0)
    group = np.full(feature.shape, -1)
    group[feature] = layout.groups_at(table.block[feature], table.stream[feature])
    for branch in branches(engine):
        of_branch = feature & (table.branch == branch)
        rows += [np.flatnonzero(of_branch & (group == number))[-1] for number in np.unique(group[of_branch])]
    return np.array([*rows, engine.sources], np.int64)


def branches(engine):
    """Numbers of the branches that were traced."""
    return sorted({info.branch for info in engine.infos})


def steps_conserved(engine, rows):
    """Largest of |sum of edges + bias - value| over the sum of absolute edges, over all evaluations; and the edges."""
    found = pull_rows(engine, rows, rows.size)
    edges = np.asarray(found.edges, np.float64)
    scale = np.abs(edges).sum(axis=1)
    return float(np.max(np.abs(edges.sum(axis=1) + found.bias - found.preactivation) / scale)), found


def replay(engine, steps, texts, latents):
    """The affine map of a span, evaluated forwards: all branches from the same latents, the Euler step of all."""
    z, moved, readings = latents, jnp.zeros_like(latents), []
    for number, (prepared, info, sources) in enumerate(zip(engine.steps, engine.infos, steps, strict=True)):
        weights = prepared.record.weights
        boundary = sources.boundary._replace(
            img=PROJECT(weights.img_in, z), txt=PROJECT(weights.txt_in, texts[info.branch])
        )
        reading = RUN_REPLACEMENT(prepared.record, prepared.sites, sources._replace(boundary=boundary))
        readings.append(reading._replace(latents=z))
        weight = 1.0 if info.branches == 1 else info.guidance if info.branch == PROMPT else 1 - info.guidance
        moved = moved + (info.sigmas[info.step + 1] - info.sigmas[info.step]) * weight * reading.velocity
        if (number + 1) % info.branches == 0:
            z, moved = z + moved, jnp.zeros_like(z)
    return tuple(readings)


def entering(engine):
    """What enters a span: the sources of every evaluation, the text of every branch, and the first latents."""
    texts = [one.record.text for one in engine.steps[: len(branches(engine))]]
    return [one.sources for one in engine.steps], texts, engine.steps[0].record.latents


def doubled(engine, row):
    """What enters a span with one of its sources doubled."""
    table, info = engine.table, engine.infos[0]
    steps, texts, latents = entering(engine)
    position = int(table.position[row])
    if table.kind[row] == INPUT:
        if table.stream[row] == LATENT:
            return steps, texts, twice(latents, position)
        texts[table.branch[row]] = twice(texts[table.branch[row]], position)
        return steps, texts, latents
    number = [(i.step, i.branch) for i in engine.infos].index((table.step[row], table.branch[row]))
    block, stream = int(table.block[row]), int(table.stream[row])
    group = int(info.layout.groups_at(block, stream))
    at = int(info.layout.rows_at(group, stream, position, info.tokens_of))
    place = (block - engine.steps[0].record.first_layers[group], at)
    field = "errors" if table.kind[row] == ERROR else "values"
    if field == "values":
        index = np.asarray(engine.steps[number].sites[group].layers.index)[place]
        place = (*place, int(np.flatnonzero(index == table.feature[row])[0]))
    pair = getattr(steps[number], field)
    new = tuple(twice(one, place) if i == group else one for i, one in enumerate(pair))
    steps[number] = steps[number]._replace(**{field: new})
    return steps, texts, latents


def some_sources(engine, each=2):
    """Rows of features and errors of every step and branch, of every branch's text and of the first latents."""
    table, rng, chosen = engine.table, np.random.default_rng(1), []
    for info in engine.infos:
        for kind in (FEATURE, ERROR):
            of = (table.kind == kind) & (table.step == info.step) & (table.branch == info.branch) & (table.value > 0)
            chosen += rng.choice(np.flatnonzero(of), each).tolist()
    for stream, branch in (*((TXT, number) for number in branches(engine)), (LATENT, PROMPT)):
        of = (table.kind == INPUT) & (table.stream == stream) & (table.branch == branch)
        chosen += rng.choice(np.flatnonzero(of), each).tolist()
    return chosen


def steps_intervened(engine, rows, found, each=2):
    """Largest difference of an edge and the effect of doubling its source, over the target's sum of absolute edges.

    Over all evaluations of a span; `found` is what `pull_rows` gave for the targets. The affine map's values at the
    sources must be the recorded ones, and their largest difference over the same sums comes second.
    """
    edges = np.asarray(found.edges, np.float64)
    scale = np.abs(edges).sum(axis=1)
    before = read_targets(engine, rows, replay(engine, *entering(engine)))
    worst = 0.0
    for source in some_sources(engine, each):
        moved = read_targets(engine, rows, replay(engine, *doubled(engine, source))) - before
        worst = max(worst, float(np.max(np.abs(moved - edges[:, source]) / scale)))
    return worst, float(np.max(np.abs(before - found.preactivation) / scale))
