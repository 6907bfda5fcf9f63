"""The siblings that ship: whole, small, right, and held to the laws of attribution with their trained weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.config import ORGANISMS
from difffract_jax.directories import SIBLINGS
from difffract_jax.loading import described_pipeline, load_pipeline, load_transcoders
from difffract_jax.organism.architectures import ARCHITECTURES
from difffract_jax.organism.evaluate import draw_images, held_out, see
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.vocabulary import is_of_the_world, word_starts
from difffract_jax.studies.cases import draw_cases, recolourings
from difffract_jax.transcoders.transcoder import check_fit
from laws import conservation, intervention_error
from tolerances import TOL, relative_error

PROMPT = "a red circle left of a blue square"


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_is_whole_and_small(name):
    config, tcs = described_pipeline(name), load_transcoders(name)
    made_of = ARCHITECTURES[name.partition("-")[2]]
    assert (config.scheduler, config.defaults) == (made_of.scheduler, made_of.defaults)
    check_fit(tcs, config.transformer)
    layout = config.transformer.layout
    assert sum(map(len, tcs.sites.groups.values())) == sum(map(len, layout.labels.values()))
    assert name in ORGANISMS and is_of_the_world(name)
    files = [path for path in SIBLINGS[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 10**6


@pytest.mark.parametrize("name", SIBLINGS)
def test_two_objects_are_bound(name):
    """On a few held-out captions; the card counts a thousand."""
    asked = held_out(16, "two shapes")
    assert judge(asked, see(draw_images(load_pipeline(name), asked))).right.sum() >= 14


def make_trace(name, dtype):
    tcs = load_transcoders(name, dtype=dtype)
    trace = capture(load_pipeline(name, dtype=dtype), tcs, PROMPT, step=1, output=True)
    return trace, tcs, prepare_step(trace, tcs)


def groups_with_sites(trace):
    return sum(group.mlp for group in trace.info.layout.groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_in_float64_the_replacement_is_the_model_and_every_edge_an_intervention(name, x64):
    trace, tcs, prepared = make_trace(name, jnp.float64)
    assert relative_error(jax.jit(run_replacement)(*prepared).velocity, trace.record.velocity) <= TOL.x64
    conserved = conservation(trace, tcs, prepared)
    caused = intervention_error(trace, tcs, prepared, groups_with_sites(trace))
    print(f"{name}, float64: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_x64
    assert caused <= TOL.intervention_x64


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_in_float32_edges_add_up_and_are_interventions(name):
    trace, tcs, prepared = make_trace(name, jnp.float32)
    conserved = conservation(trace, tcs, prepared)
    caused = intervention_error(trace, tcs, prepared, groups_with_sites(trace))
    print(f"{name}, float32: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_f32
    assert caused <= TOL.direct_f32


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_studies_edit_at_the_words_of_an_object(name):
    pipe = load_pipeline(name)
    material = draw_cases(pipe, recolourings(70_000, 4, 5_000_000))
    assert len(material.cases) >= 3
    for case, phrase in zip(material.cases, material.phrase, strict=True):
        meant = np.flatnonzero(phrase)
        starts = word_starts(pipe.tokenizers)
        words, size = case.prompt.split(), len(meant) // len(starts)
        ids = pipe.tokenizers.encode(case.prompt, pipe.config.defaults.text_tokens).t5_ids
        pieces = [piece.strip("\u2581") for piece in pipe.tokenizers.pieces(ids)]
        for part in np.split(meant, len(starts)):
            assert " ".join(pieces[at] for at in part) in case.prompt and size <= len(words)
