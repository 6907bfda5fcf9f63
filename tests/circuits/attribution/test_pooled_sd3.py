"""The pooled path of Stable Diffusion 3: blocks that attend twice, a last text without an MLP, two CLIPs that pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pooled_path import integrate
from difffract_jax.circuits.attribution.pooled_words import word_parts
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import encode
from difffract_jax.models.tokenizers import encode_prompt
from sd3 import CLIP_LENGTH, tiny_pipeline
from tolerances import TOL, relative_error
from traces import make_transcoders

PROMPT = "a red fox"
SIZE = {"height": 16, "width": 24, "steps": 2, "text_tokens": CLIP_LENGTH + 12, "guidance": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline in float64, transcoders of some sites, and a trace of one step."""
    home = tmp_path_factory.mktemp("sd3") / "diffusers"
    tiny_pipeline("sd3.5-medium").save_pretrained(home)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        pipe = load_pipeline(home, dtype=jnp.float64)
        tcs = make_transcoders(pipe.config.transformer, dtype=jnp.float64, skip=True, img=(0, 1, 2), txt=(0, 1))
        return pipe, tcs, capture(pipe, tcs, PROMPT, step=1, output=True, run=pipe.plan(**SIZE))


@pytest.fixture(scope="module")
def effects(made):
    """What modulations bring to the velocity and to a feature of the last block."""
    pipe, tcs, trace = made
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        engine = make_engine(trace, tcs, (resolve_target(pipe, trace, parse_target("velocity:")),))
        rows = np.array([engine.sources, target_row(engine, strongest_feature(trace, tcs, "img", 2))])
        return {parts: integrate(engine, rows, pipe, parts) for parts in (1, 2)}


@pytest.mark.slow
def test_modulations_and_the_remainder_add_up_to_the_exchange(made, effects):
    pipe, _, trace = made
    few, many = (np.abs(one.remainder) / np.abs(one.edges).sum(axis=1) for one in effects.values())
    print(f"remainder over the sum of sizes: {few} with 1 part, {many} with 2")
    assert np.all(many <= TOL.conservation_x64) and np.all(few > many)
    found = effects[2]
    assert np.all(np.abs(found.swap) > 0) and not found.rounding.any()
    # Nine rows of the image in the block that attends twice, two of the last text, two of the last norm.
    assert found.edges.shape[1] == (9 + 6) + (6 + 6) + (6 + 2) + 2
    # Each CLIP's channels are exchanged.
    width = pipe.config.clip.projections[0]
    assert np.all(found.exchanged[0][:width] != 0) and np.all(found.exchanged[0][width:] != 0)
    # What conditions the text of the last block past its attention is nothing: no gate, and no MLP.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        pooled = [np.asarray(encode(pipe, text, SIZE["text_tokens"]).pooled) for text in (PROMPT, "")]
    assert relative_error(found.exchanged[0], pooled[0] - pooled[1]) <= TOL.x64
    assert trace.info.layout.depth == 3


@pytest.mark.slow
def test_words_of_both_clips_and_what_they_miss_add_up_to_each_modulation(made, effects):
    pipe, _, _ = made
    found, tokens = effects[2], SIZE["text_tokens"]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        words = word_parts(pipe, PROMPT, tokens, found.weights[0], found.exchanged[0])
        ids, empty = (encode_prompt(pipe.tokenizers, text, tokens).clip_ids for text in (PROMPT, ""))
        # What each CLIP makes between the two prompts' tokens, read at one place.
        moved = []
        for clip, one, other in zip(
            (pipe.clip.first, pipe.clip.second), np.split(ids, 2), np.split(empty, 2), strict=True
        ):
            ends = [clip.projection(clip.text.encode_embedded(clip.text.embedded(x), one)[1]) for x in (one, other)]
            moved.append(np.asarray(ends[0] - ends[1]))
    scale = np.abs(words.edges).sum(axis=1) + np.abs(words.missed)
    apart = words.edges.sum(axis=1) + words.missed - found.edges[0]
    assert np.all(np.abs(apart) <= TOL.conservation_x64 * scale)
    assert relative_error(words.edges.sum(axis=1), found.weights[0] @ np.concatenate(moved)) <= 1e-5
    # The second CLIP fills up with another token than the one that ends a prompt, which therefore counts as a word.
    assert words.text == ("a", "r", "e", "d", "f", "o", "x", "<|endoftext|>")
    assert words.place.tolist() == list(range(1, 9))
