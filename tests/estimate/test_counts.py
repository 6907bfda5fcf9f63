"""Bytes that are counted from shapes, held against arrays, recorded runs and what the compiler says."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.transcoders import stacked_transcoders
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pooled_runs import moved_alone, moved_between, slopes_at
from difffract_jax.circuits.attribution.pooled_steps import Walk, evaluations_of, prompts_of
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.estimate.counts import COMMANDS, KEEPING, PROGRAM, count, decoder_rows, remedies
from difffract_jax.estimate.weights import (
    Transcoders,
    bytes_of,
    largest_block,
    largest_leaf,
    transcoder_bytes,
    weights_needed,
)
from difffract_jax.estimate.work import Work
from difffract_jax.loading import (
    PARTS,
    described_pipeline,
    load_pipeline,
    load_transcoders,
    save_pipeline,
    save_transcoders,
)
from difffract_jax.models import pipeline
from difffract_jax.models.mmdit import FluxConfig, Inputs
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.sites import parse_sites
from difffract_jax.transcoders.transcoder import TranscoderConfig, random_transcoders

GIB = 2**30
FLUX = described_pipeline("flux-schnell")
SHAPES = {name: getattr(FLUX, name) for name in PARTS}
# Wide enough that arrays, not the odd kilobyte, make up what the compiler needs.
MIDDLE = FluxConfig(
    depth_double=6,  # loops of more than `UNROLLED` blocks, as all real models have
    depth_single=6,
    heads=8,
    head_dim=64,
    rope_axes=(16, 24, 24),
    in_channels=16,
    out_channels=16,
    text_width=256,
    pooled_width=64,
    guidance=False,
)


@cache
def middle() -> pipeline.Pipeline:
    """A pipeline of this shape in float32, made once."""
    return random_pipeline(transformer=MIDDLE)


def shapes_of(pipe: pipeline.Pipeline) -> dict:
    return {name: getattr(pipe.config, name) for name in PARTS}


def traced(sites: tuple[str, ...] = ("img/3-18", "txt/3-18"), **changes) -> Work:
    """The trace of 16 double blocks of FLUX at 512 px whose programs docs/performance.md compiles."""
    config = TranscoderConfig(d_model=3072, features=49_152, time_embed=256)
    tcs = Transcoders(config, parse_sites(sites, FLUX.transformer.layout), 4)
    work = Work("trace", SHAPES, jnp.bfloat16, (32, 32), 512, tcs, (3, 19), targets=25)
    return work._replace(**changes)


def test_scores_that_are_explained_take_memory_for_every_target() -> None:
    without, one, two = (count(traced(explained=number)) for number in (0, 1, 2))
    assert [phase.name for phase in without.phases] == [phase.name for phase in one.phases[:-1]]
    scores = 24 * 1536**2 * 4
    assert [each.phases[-1].held["scores"] for each in (one, two)] == [3 * scores, 4 * scores]
    changes = [("--attention frozen", lambda work: work._replace(explained=0))]
    assert remedies(traced(explained=400), without.needed, changes)[0] == ["--attention frozen"]


def test_an_explained_pooled_path_keeps_the_model_and_runs_it_backwards() -> None:
    without, with_it = (count(traced(pooled=pooled)) for pooled in (False, True))
    assert [phase.name for phase in without.phases] == [phase.name for phase in with_it.phases[:-1]]
    last = with_it.phases[-1]
    assert last.held["streams entering blocks"] == 57 * 1536 * 3072 * 4 and last.held["model"] > 20e9
    assert "latents of exchanges" not in last.held
    assert last.passing > 9 * 24 * 1536**2 and without.needed < with_it.needed
    changes = [("--pooled frozen", lambda work: work._replace(pooled=False))]
    assert remedies(traced(pooled=True), without.needed, changes)[0] == ["--pooled frozen"]


def test_an_explained_pooled_path_over_steps_holds_latents_of_every_exchange() -> None:
    one, two = (
        count(traced(pooled=True, recorded=(0, 57), steps=2 * branches, branches=branches)).phases[-1]
        for branches in (1, 2)
    )
    each = 344 * 1024 * 64 * 4  # 90 MB at 512 px, 361 at 1024
    assert (one.held["latents of exchanges"], two.held["latents of exchanges"]) == (2 * each, 3 * each)
    assert two.held["ends of lines"] == 2 * one.held["ends of lines"]
    assert one.passing >= 2 * each and two.passing >= 3 * each


def pooled_over_steps(pipe: pipeline.Pipeline, size: int, text: int) -> tuple[Walk, Work]:
    """The evaluations of two steps and of a step's feature, and their count."""
    config = pipe.config.transformer
    tcs = random_transcoders(config, features=64, sites={"img": (0, 1), "txt": (0, 1)})
    span = capture_steps(pipe, tcs, "a red fox", last=1, run=pipe.plan(height=size, width=size, text_tokens=text))
    engine = make_engine(span, tcs, (resolve_target(pipe, span, parse_target("velocity:")),))
    feature = target_row(engine, strongest_feature(span, tcs, "img", 1))
    walk = evaluations_of(engine, np.array([engine.sources, feature]), pipe, prompts_of(engine, pipe))
    work = Work("trace", shapes_of(pipe), jnp.float32, walk[0].info.grid, text, Transcoders(tcs.config, tcs.sites, 4))
    return walk, work._replace(recorded=(0, config.layout.depth), steps=2, pooled=True)


def test_what_a_pooled_path_over_steps_holds_is_what_is_there() -> None:
    pipe = random_pipeline()
    walk, work = pooled_over_steps(pipe, 32, 16)
    held, one = count(work).phases[-1].held, walk[0]
    assert held["ends of lines"] == bytes_of([each.ends for each in walk])
    latents = jax.ShapeDtypeStruct((one.modulations, *one.step.record.latents.shape), jnp.float32)
    given = one.model, one.step.record, one.ends, one.readings, jnp.arange(one.modulations), latents
    velocities = jax.eval_shape(partial(moved_alone, blocks=one.blocks), *given)[1]
    assert held["latents of exchanges"] == bytes_of([latents, velocities])


@pytest.mark.slow
def test_what_a_pooled_path_needs_in_between_bounds_the_compilers() -> None:
    walk, work = pooled_over_steps(middle(), 128, 64)
    one, last = walk[-1], count(work).phases[-1]
    latents = jnp.zeros((one.modulations, *one.step.record.latents.shape))
    given, every = (one.model, one.step.record), jnp.arange(one.modulations)
    line = *given, one.line, one.ends, one.readings
    programs = (
        slopes_at.lower(*line, jnp.asarray(0.5), latents[0], **one.sizes),
        moved_between.lower(*line, jnp.arange(2.0), latents[:2], **one.sizes),
        moved_alone.lower(*given, one.ends, one.readings, every, latents, blocks=one.blocks),
    )
    needed = [program.compile().memory_analysis().temp_size_in_bytes for program in programs]
    counted = last.passing + last.held["streams entering blocks"]
    assert max(needed) <= counted <= 3 * max(needed), needed


def test_weights_are_those_of_the_arrays() -> None:
    pipe = random_pipeline()
    parts = {name: getattr(pipe, name) for name in PARTS}
    assert weights_needed(shapes_of(pipe)) == {name: bytes_of(part) for name, part in parts.items()}
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(parts)]
    assert largest_leaf(shapes_of(pipe), jnp.float32) == max(leaves)
    block = jax.tree.map(lambda leaf: leaf[0], pipe.transformer.double)
    assert largest_block({"transformer": pipe.config.transformer}) == bytes_of(block)


def test_half_the_type_is_half_the_weights() -> None:
    full, half = (weights_needed(SHAPES, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert {name: size // 2 for name, size in full.items()} == half
    assert sum(half.values()) == pytest.approx(31.4 * GIB, rel=1e-3)
    assert largest_block(SHAPES, jnp.bfloat16) == pytest.approx(0.633 * GIB, rel=1e-3)


@pytest.mark.parametrize(
    "shape", [{}, {"conditioning": "none", "time_embed": 0}, {"activation": "jumprelu"}, {"skip": True}]
)
def test_a_transcoder_takes_what_its_arrays_take(shape: dict) -> None:
    config = TranscoderConfig(**{"d_model": 24, "features": 96, "time_embed": 16} | shape)
    each = transcoder_bytes(Transcoders(config, parse_sites(["img/0"], FLUX.transformer.layout), 4))
    assert 3 * each == bytes_of(stacked_transcoders(config, 3, jnp.float32))


def test_a_record_takes_what_was_recorded() -> None:
    pipe = middle()
    tcs = random_transcoders(MIDDLE, features=64, sites={"img": (0, 1), "txt": (0, 1)})
    trace = capture(pipe, tcs, "a red fox", run=pipe.plan(height=64, width=64, text_tokens=32, steps=2))
    prepared = prepare(trace, tcs).steps[0]
    active = prepared.sources.values[0].shape[-1]
    work = Work(
        "trace", shapes_of(pipe), jnp.float32, (8, 8), 32, Transcoders(tcs.config, tcs.sites, 4, active), (0, 2)
    )
    phase = next(phase for phase in count(work).phases if phase.name == "encode sites")
    record = bytes_of(trace.record._replace(weights=None))
    assert phase.held["record"] == pytest.approx(record, rel=0.1)
    codes = bytes_of((prepared.sources.values, prepared.sources.errors, [site.layers.index for site in prepared.sites]))
    assert phase.held["codes and errors"] == pytest.approx(codes, rel=0.01)


def test_what_a_streamed_trace_holds_is_what_is_there(tmp_path) -> None:
    tcs = random_transcoders(MIDDLE, features=512, sites={"img": (1, 2), "txt": (1, 2)})
    save_pipeline(middle(), tmp_path / "model")
    save_transcoders(tcs, tmp_path / "transcoders")
    pipe = load_pipeline(tmp_path / "model", weights="disk")
    streamed = load_transcoders(tmp_path / "transcoders", weights="disk")
    trace = capture(pipe, streamed, "a red fox", run=pipe.plan(height=64, width=64, text_tokens=32, steps=2))
    step = prepare(trace, streamed).steps[0]
    active = max(values.shape[-1] for values in step.sources.values)
    work = Work(
        "trace", shapes_of(pipe), jnp.float32, (8, 8), 32, Transcoders(tcs.config, tcs.sites, 4, active), (1, 3)
    )
    work = work._replace(streamed=True)
    phases = {phase.name: phase for phase in count(work).phases}
    parts = [getattr(pipe, name) for name in PARTS]
    assert phases["record the run"].held["weights around the blocks"] == bytes_of(parts)
    assert phases["pull back"].held["slim blocks"] == bytes_of(trace.record.weights.stacks)
    assert phases["encode sites"].held["two transcoders"] == 2 * transcoder_bytes(work.tcs)
    kept = bytes_of([one.stack.dec.kernel for one in step.sites if one.stack is not None])
    assert kept <= decoder_rows(work, bounded=True) == decoder_rows(work, bounded=False)
    assert decoder_rows(work._replace(room=4000), bounded=True) == 1000
    more = count(work._replace(steps=2)).phases[-1].passing - phases["pull back"].passing
    assert more >= decoder_rows(work, bounded=True)


def test_rows_of_prompts_are_those_of_all_steps(tmp_path) -> None:
    few, many = traced(command="harvest", steps=4, tokens=16), traced(command="harvest", steps=4)
    rows = [next(phase for phase in count(work).phases if phase.name == "harvest").held["rows"] for work in (few, many)]
    per_token = 2 * 3072 * 2
    assert rows == [4 * 32 * 16 * per_token, 4 * (16 * 1024 + 16 * 512) * per_token]
    streamed, whole = (count(few._replace(streamed=way)).phases[-1].passing for way in (True, False))
    assert streamed > (16 * 1024 + 16 * 512) * per_token > whole / 10


@pytest.mark.parametrize(("pixels", "text"), [(128, 64), pytest.param(512, 256, marks=pytest.mark.slow)])
def test_what_a_step_needs_in_between_bounds_the_compilers(pixels: int, text: int) -> None:
    pipe = middle()
    unit = 2 * pipe.config.vae.factor
    grid = (pixels // unit, pixels // unit)

    def shape(*axes: int, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(axes, dtype)

    inputs = Inputs(shape(grid[0] * grid[1], 16), shape(text, 256), shape(64), shape())
    model = jax.eval_shape(lambda: pipe.transformer)
    step = (pipeline.model_velocity, model, inputs, shape(), shape(dtype=jnp.int32), grid)
    compiled = pipeline.euler_step.lower(*step).compile().memory_analysis().temp_size_in_bytes
    work = Work("generate", shapes_of(pipe), jnp.float32, grid, text)
    counted = next(phase for phase in count(work).phases if phase.name == "denoise").passing
    assert compiled <= counted <= 3 * compiled


def test_a_processor_widens_all_bfloat16_weights_at_once() -> None:
    pipe = random_pipeline(transformer=MIDDLE, dtype=jnp.bfloat16)

    def shape(*axes: int, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(axes, dtype)

    inputs = Inputs(shape(64, 16), shape(32, 256), shape(64), shape())
    step = (pipeline.model_velocity, pipe.transformer, inputs, shape(), shape(dtype=jnp.int32), (8, 8))
    compiled = pipeline.euler_step.lower(*step).compile().memory_analysis().temp_size_in_bytes
    work = Work("generate", shapes_of(pipe), jnp.bfloat16, (8, 8), 32)
    here, gpu = (
        next(phase for phase in count(work._replace(host=host)).phases if phase.name == "denoise").passing
        for host in (True, False)
    )
    assert gpu < compiled / 2 and here == pytest.approx(compiled, rel=0.2)


def test_a_trace_of_flux_is_counted_as_it_was_compiled() -> None:
    # docs/performance.md, compiled for a TPU: 79.4 GiB to record, 48.6 to encode, 58.2 to pull back, 9 of which are
    # a copy that only that compiler makes.
    needed = {phase.name: phase.needed / GIB for phase in count(traced()).phases}
    assert needed["record the run"] == pytest.approx(79.4, rel=0.02)
    assert needed["encode sites"] == pytest.approx(48.6, rel=0.02)
    assert 48.6 < needed["pull back"] < 58.2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_counted_and_streaming_needs_less(command: str) -> None:
    work = traced(command=command)
    whole, streamed = count(work), count(work._replace(streamed=True))
    assert whole.command == command and whole.phases
    assert whole.held <= whole.needed == max(phase.needed for phase in whole.phases)
    if command == "convert":  # holds a slice of an array either way
        assert 0 < streamed.needed == whole.needed < GIB
    elif command in KEEPING:  # all transcoders stay, the model's blocks do not
        assert 0 < streamed.needed < whole.needed - 0.8 * sum(weights_needed(SHAPES, jnp.bfloat16).values())
    else:
        assert whole.held > 0 and streamed.needed < whole.needed / 2
    host = count(work._replace(host=True))
    assert all(phase.held["Python and JAX"] == PROGRAM for phase in host.phases)


@pytest.mark.parametrize(
    "more",
    [{"grid": (64, 64)}, {"text_tokens": 1024}, {"recorded": (2, 19)}, {"steps": 2}, {"dtype": jnp.float32}],
)
def test_more_work_needs_more(more: dict) -> None:
    for command in ("trace", "validate"):
        work = traced(command=command)
        assert count(work._replace(**more)).needed > count(work).needed


def test_remedies_stop_where_it_fits_and_leave_out_what_helps_nothing() -> None:
    ways = [
        ("--batch 1", lambda work: work._replace(batch=1)),
        ("--transcoder-dtype bf16", lambda work: work._replace(tcs=work.tcs._replace(itemsize=2))),
        ("--weights disk", lambda work: work._replace(streamed=True)),
    ]
    assert remedies(traced(), 100 * GIB, ways) == ([], count(traced()).needed)
    taken, needed = remedies(traced(), 70 * GIB, ways)
    assert taken == ["--transcoder-dtype bf16"] and needed < 70 * GIB
    taken, needed = remedies(traced(), GIB, ways)
    assert taken == ["--transcoder-dtype bf16", "--weights disk"] and needed > GIB
