"""Outputs and several steps: every kind of target adds up, and every kind of edge is its direct intervention."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import LATENT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, pull_rows, read_targets
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import named, strongest_feature
from difffract_jax.circuits.frozen.replacement import run_replacement
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT
from difffract_jax.models.tiny import random_pipeline
from laws import twice
from tolerances import TOL, relative_error
from traces import DEV, IMAGE, JOINT, cast, make_transcoders

PROMPT = "a red circle"
SIZE = {"height": 24, "width": 32, "text_tokens": 16}
OUTPUTS = ("velocity:", 'velocity:contrast="a blue square",box=0,0,16,24', "pixels:color=red,minus=blue,box=8,8,24,20")


def kinds(*named, slow=()):
    """Kinds of targets, some of them with the slow tests: every kind adds up in one of the precisions by default."""
    return [*named, *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow)]


@cache
def made(dtype):
    """A pipeline of FLUX.1-dev's kind, its transcoders of all groups, and a span of three steps from step 1."""
    pipe = random_pipeline(seed=3, dtype=dtype, transformer=DEV)
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(1, 2), joint=(0, 1), skip=True, dtype=dtype)
    return pipe, tcs, capture_steps(pipe, tcs, PROMPT, first=1, last=3, run=pipe.plan(**SIZE))


def target_of(kind, pipe, tcs, trace):
    """The strongest feature of a stream's last site, or an output."""
    if kind in OUTPUTS:
        return resolve_target(pipe, trace, parse_target(kind))
    return strongest_feature(trace, tcs, kind, 1 if kind == "single" else 2)


def replay(engine, changed):
    """The affine map of a span, evaluated forwards: sources of every step, then text and latents."""
    steps, text, latents = changed
    readings, z = [], latents
    for prepared, info, sources in zip(engine.steps, engine.infos, steps, strict=True):
        weights = prepared.record.weights
        boundary = sources.boundary._replace(img=weights.img_in(z), txt=weights.txt_in(text))
        reading = run_replacement(prepared.record, prepared.sites, sources._replace(boundary=boundary))
        readings.append(reading._replace(latents=z))
        z = z + (info.sigmas[info.step + 1] - info.sigmas[info.step]) * reading.velocity
    return tuple(readings)


def doubled(engine, row):
    """The span's sources with one of them doubled."""
    table, info = engine.table, engine.infos[0]
    steps = [prepared.sources for prepared in engine.steps]
    record = engine.steps[0].record
    text, latents = record.text, record.latents
    position, block = int(table.position[row]), int(table.block[row])
    if table.kind[row] == INPUT:
        latents, text = (
            (twice(latents, position), text) if table.stream[row] == LATENT else (latents, twice(text, position))
        )
        return steps, text, latents
    number = [i.step for i in engine.infos].index(table.step[row])
    group, layer = int(table.stream[row]), block
    if block >= 3:
        position += info.text_tokens if group == 0 else 0
        group, layer = JOINT, block - 3
    field = "errors" if table.kind[row] == ERROR else "values"
    pair = getattr(steps[number], field)
    place = (layer, position)
    if field == "values":
        index = np.asarray(engine.steps[number].sites[group].layers.index)[layer, position]
        place = (*place, int(np.flatnonzero(index == table.feature[row])[0]))
    new = tuple(twice(one, place) if i == group else one for i, one in enumerate(pair))
    steps[number] = steps[number]._replace(**{field: new})
    return steps, text, latents


@pytest.mark.parametrize("kind", kinds("img", "single", OUTPUTS[2], slow=("txt", OUTPUTS[0])))
def test_over_several_steps_every_target_adds_up_and_edges_are_interventions(x64, kind):
    pipe, tcs, span = made(jnp.float64)
    target = target_of(kind, pipe, tcs, span)
    outputs = (target,) if kind in OUTPUTS else ()
    engine = make_engine(span, tcs, outputs)
    row = engine.sources if outputs else _row(engine, target)
    found = pull_rows(engine, np.array([row], np.int64), 4)
    scale = np.abs(found.edges).sum()
    assert abs(found.edges.sum() + found.bias[0] - found.preactivation[0]) <= TOL.conservation_x64 * scale
    replayed = jax.jit(lambda changed: replay(engine, changed))
    record = engine.steps[0].record
    still = replayed(([prepared.sources for prepared in engine.steps], record.text, record.latents))
    before = read_targets(engine, np.array([row], np.int64), still)[0]
    assert abs(before - found.preactivation[0]) <= TOL.x64 * scale
    rng = np.random.default_rng(1)
    table = engine.table
    for step, code in [(1, FEATURE), (1, ERROR), (2, FEATURE), (3, FEATURE), (3, ERROR), (1, INPUT), (1, INPUT)]:
        rows = np.flatnonzero((table.kind == code) & (table.step == step) & (table.value > 0))
        for source in rng.choice(rows, 3):
            moved = read_targets(engine, np.array([row], np.int64), replayed(doubled(engine, source)))[0] - before
            assert abs(moved - found.edges[0, source]) <= TOL.intervention_x64 * scale


def test_targets_of_different_steps_go_together(x64):
    pipe, tcs, span = made(jnp.float64)
    outputs = tuple(
        resolve_target(pipe, span, parse_target(text), step=step) for text, step in ((OUTPUTS[2], 1), (OUTPUTS[0], 3))
    )
    engine = make_engine(span, tcs, outputs)
    feature = np.flatnonzero((engine.table.kind == FEATURE) & (engine.table.step == 2) & (engine.table.value > 0))[-1]
    rows = np.array([engine.sources, feature, engine.sources + 1], np.int64)
    found = pull_rows(engine, rows, 4)
    scale = np.abs(found.edges).sum(axis=1)
    assert np.all(np.abs(found.edges.sum(axis=1) + found.bias - found.preactivation) <= TOL.conservation_x64 * scale)
    for row, step in zip(found.edges, (1, 2, 3), strict=True):
        assert not row[(engine.table.step > step)[: engine.sources]].any()
    for i, row in enumerate(rows):
        alone = pull_rows(engine, rows[i : i + 1], 1)
        assert relative_error(alone.edges[0], found.edges[i]) <= TOL.x64, row


@pytest.mark.slow
def test_spans_of_bfloat16_weights_add_up_too():
    pipe, tcs, _ = made(jnp.float32)
    half = cast(pipe.transformer, jnp.bfloat16)
    span = capture_steps(pipe._replace(transformer=half), tcs, PROMPT, first=1, last=3, run=pipe.plan(**SIZE))
    graph = attribute(span, tcs, target=target_of("img", pipe, tcs, span), max_nodes=10, expansion_batch=10)
    assert graph.largest_conservation_error <= TOL.conservation_steps_f32


def _row(engine, feature):
    rows = [r for r in np.flatnonzero(engine.table.kind == FEATURE) if engine.table.feature[r] == feature.feature]
    return next(int(r) for r in rows if str(named(engine, int(r))) == str(feature))


@pytest.mark.parametrize("kind", kinds("txt", OUTPUTS[1], slow=(OUTPUTS[0], OUTPUTS[2])))
def test_float32_adds_up(kind):
    pipe, tcs, span = made(jnp.float32)
    target = target_of(kind, pipe, tcs, span)
    graph = attribute(span, tcs, target=target, max_nodes=30, expansion_batch=10)
    assert graph.largest_conservation_error <= TOL.conservation_steps_f32
    assert set(graph.node_step) == {1, 2, 3}
    trace = capture(pipe, tcs, PROMPT, step=2, output=True, run=pipe.plan(**SIZE))
    graph = attribute(trace, tcs, target=target_of(kind, pipe, tcs, trace), max_nodes=30, expansion_batch=10)
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert graph.node_kind[0] == (OUTPUT if kind in OUTPUTS else FEATURE)


def test_a_span_of_one_step_explains_it_as_the_step_alone_does(x64):
    pipe, tcs, _ = made(jnp.float64)
    span = capture_steps(pipe, tcs, PROMPT, first=2, last=2, run=pipe.plan(**SIZE))
    trace = capture(pipe, tcs, PROMPT, step=2, output=True, run=pipe.plan(**SIZE))
    rows = []
    for one in (span, trace):
        output = resolve_target(pipe, one, parse_target(OUTPUTS[2]))
        engine = make_engine(one, tcs, (output,))
        rows.append((engine, pull_rows(engine, np.array([engine.sources]), 1)))
    (a, ours), (b, theirs) = rows
    assert ours.preactivation == pytest.approx(theirs.preactivation, rel=TOL.x64)
    own = a.table.kind[: a.sources] != INPUT
    assert relative_error(ours.edges[0, own], theirs.edges[0, b.table.kind[: b.sources] != INPUT]) <= TOL.x64
    # The projections' biases are the bias's in the one, the inputs' in the other.
    rest = [found.edges[0, ~mine].sum() + found.bias[0] for found, mine in ((ours, own), (theirs, _own(b)))]
    assert rest[0] == pytest.approx(rest[1], rel=1e-9)


def _own(engine):
    return engine.table.kind[: engine.sources] != INPUT


def test_a_pixel_objective_is_the_image_s(x64):
    pipe, tcs, span = made(jnp.float64)
    target = parse_target("pixels:color=#00ff00,box=0,0,8,4")
    output = resolve_target(pipe, span, target)
    record = span.traces[-1].record
    clean = record.latents - record.t * record.velocity
    image = np.asarray(_decode(pipe, clean, span.info.grid)) / 2 + 0.5
    along = np.array([-1, 1, -1]) / np.sqrt(3)
    expected = ((image[:4, :8] - 0.5) @ along).mean()
    engine = make_engine(span, tcs, (output,))
    readings = tuple(one.record.reading for one in span.traces)
    value = read_targets(engine, np.array([engine.sources]), readings)[0]
    assert value == pytest.approx(expected, rel=1e-10)


def _decode(pipe, latents, grid):
    from difffract_jax.models.pipeline import decode_raw

    return decode_raw(pipe.vae, latents, grid)


def test_several_targets_share_one_graph():
    pipe, tcs, span = made(jnp.float32)
    targets = [(target_of(kind, pipe, tcs, span), weight) for kind, weight in ((OUTPUTS[0], 3.0), ("img", 1.0))]
    graph = attribute(span, tcs, target=targets, max_nodes=20, expansion_batch=10)
    assert graph.targets.tolist() == [0, 1]
    assert graph.root_weights[:2].tolist() == [0.75, 0.25] and not graph.root_weights[2:].any()
    assert graph.node_kind[:2].tolist() == [OUTPUT, FEATURE]
    assert graph.largest_conservation_error <= TOL.conservation_steps_f32
    alone = attribute(span, tcs, target=targets[1][0], max_nodes=10, expansion_batch=10)
    assert graph.target_preactivation[1] == alone.target_preactivation[0]


def test_the_pooled_path_is_what_swapping_the_embedding_moves():
    pipe, tcs, span = made(jnp.float32)
    graph = attribute(span, tcs, target=target_of("img", pipe, tcs, span), max_nodes=2, expansion_batch=10)
    (path,) = graph.provenance.pooled_path
    assert path.value == graph.target_preactivation[0]
    assert path.share == pytest.approx(abs(path.value - path.without) / abs(path.value))
    assert path.without != path.value
    silent = capture_steps(pipe, tcs, "", first=1, last=2, run=pipe.plan(**SIZE))
    graph = attribute(silent, tcs, target=target_of("img", pipe, tcs, silent), max_nodes=2, expansion_batch=10)
    assert graph.provenance.pooled_path[0].share == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pixel:color=red", "is not a target; write a FEATURE"),
        ("pixels:box=0,0,4,4", "names no colour"),
        ("pixels:color=reddish", "'reddish' in 'pixels:color=reddish' is not a colour"),
        ("pixels:color=gray", "asks for grey"),
        ("pixels:color=red,minus=#ff0000", "asks for the colour it is set against"),
        ("pixels:color=red,color=blue", "gives color twice, which contradicts itself"),
        ("pixels:color=red,box=0,0,4,4,mask=a.png", "names a box and a mask, which contradict each other"),
        ("velocity:color=red", "has no option color; velocity takes box, contrast, mask"),
        ("velocity:contrast", "is not of the form key=value"),
    ],
)
def test_what_is_no_target_is_refused(text, sentence):
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pixels:color=red,box=1,2,3", "A box is X0,Y0,X1,Y1 in whole pixels"),
        ("pixels:color=red,box=0,0,64,8", "leaves the image, which is 32 x 24 pixels"),
        ("pixels:color=red,box=4,4,4,8", "is empty or leaves the image"),
        ("velocity:mask=absent.png", "The mask absent.png is not a file; give an image file of 32 x 24 pixels"),
        ('velocity:contrast="a red circle"', "give the same velocity in the region"),
    ],
)
def test_outputs_that_do_not_fit_the_trace_are_refused(text, sentence):
    pipe, _, span = made(jnp.float32)
    with pytest.raises(UserError) as caught:
        resolve_target(pipe, span, parse_target(text))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sentence"), [("empty", "is dark everywhere"), ("size", "is 8 x 8 pixels"), ("text", "is not a picture")]
)
def test_masks_that_do_not_fit_are_refused(tmp_path, kind, sentence):
    from PIL import Image

    pipe, _, span = made(jnp.float32)
    path = tmp_path / "mask.png"
    if kind == "text":
        path.write_text("no image")
    else:
        Image.fromarray(np.zeros((8, 8) if kind == "size" else (24, 32), np.uint8)).save(path)
    with pytest.raises(UserError, match=sentence):
        resolve_target(pipe, span, parse_target(f"pixels:color=red,mask={path}"))


def test_targets_and_budgets_that_make_no_graph_are_refused():
    pipe, tcs, span = made(jnp.float32)
    feature = target_of("img", pipe, tcs, span)
    for targets, settings, sentence in (
        ([], {}, "There is no target"),
        ([(feature, 1.0), (feature, 2.0)], {}, "given twice"),
        ([(target_of(OUTPUTS[0], pipe, tcs, span), 1.0)] * 2, {}, "velocity: is given twice"),
        ([(feature, -1.0)], {}, "must be a positive number"),
        ([(feature, 1.0), (target_of("txt", pipe, tcs, span), 1.0)], {"max_nodes": 1}, "too few for 2 targets"),
        ([(Feature("img", 2, 0, steps=(0,)), 1.0)], {}, "at other steps than the traced ones, 1, 2, 3"),
    ):
        with pytest.raises(UserError, match=sentence):
            attribute(span, tcs, target=targets, **settings)
    trace = capture(pipe, tcs, PROMPT, step=1, run=pipe.plan(**SIZE))
    with pytest.raises(UserError, match="capture with output=True"):
        resolve_target(pipe, trace, parse_target("velocity:"))


def test_activations_that_are_not_finite_are_refused():
    pipe, tcs, span = made(jnp.float32)
    last = span.traces[-1]
    errors = last.record.mlp_out[IMAGE].at[0, 0, 0].set(jnp.nan)
    broken = last.record._replace(mlp_out=(errors, *last.record.mlp_out[1:]))
    span = span._replace(traces=(*span.traces[:-1], last._replace(record=broken)))
    with pytest.raises(UserError, match="not finite"):
        attribute(span, tcs, target=target_of("img", pipe, tcs, span), max_nodes=2)
