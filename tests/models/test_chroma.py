"""Chroma's transformer against diffusers' on random weights, whole and block by block, with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from chroma import TINY, run_theirs, tiny_transformer
from converters.chroma import CHROMA_DIFFUSERS, NumberedSource, chroma_config_from_diffusers
from converters.mapping import load_tree
from converters.source import Source
from difffract_jax.models.blocks import Streams
from difffract_jax.models.chroma import ChromaMMDiT
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import sequences, slice_layer, streams
from tolerances import TOL, relative_error

GRID, WORDS, SEEN, TIME = (3, 4), 7, 4, 0.8
MASK = np.arange(WORDS) < SEEN


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both modules, what enters and leaves every block of diffusers', and its velocity."""
    theirs, seen = tiny_transformer(), []

    def keep(_, args, given, made):
        seen.append((given, made))

    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    velocity = run_theirs(theirs, *arrays(), TIME, GRID, MASK)
    for handle in handles:
        handle.remove()
    home = tmp_path_factory.mktemp("chroma")
    theirs.save_pretrained(home)
    return theirs, converted(home), seen, velocity


def converted(home, dtype=jnp.float32):
    config = chroma_config_from_diffusers(TINY)
    source = NumberedSource(Source(home), config)
    return load_tree(source, CHROMA_DIFFUSERS, abstract_module(ChromaMMDiT, config, dtype))


def arrays():
    """Latents, and text whose rows that are not seen are zeros."""
    rng = np.random.default_rng(0)
    latents, text = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 16), (WORDS, 24)))
    return latents, np.where(MASK[:, None], text, 0)


def inputs_of(text=None):
    latents, own = arrays()
    return Inputs(
        jnp.asarray(latents), jnp.asarray(own if text is None else text), jnp.zeros(0), jnp.asarray(TIME, jnp.float32)
    )


RUN, EMBED = (jax.jit(method, static_argnums=2) for method in (ChromaMMDiT.__call__, ChromaMMDiT.embed))


@jax.jit
def run_block(stack, number, h, cond):
    after, _ = slice_layer(stack, number)(sequences(h, stack.groups), cond)
    return streams(after, stack.groups, h)


def test_every_block_is_diffusers(pair):
    _, ours, seen, _ = pair
    cond, place = EMBED(ours, inputs_of(), GRID)[1], 0
    for stack in ours.stacks:
        for layer in range(stack.number.shape[0]):
            given, made = seen[place]
            if "encoder_hidden_states" in given:
                txt, img = (jnp.asarray(given[name][0].numpy()) for name in ("encoder_hidden_states", "hidden_states"))
                txt_out, img_out = (one[0].numpy() for one in made)
            else:
                txt, img = jnp.split(jnp.asarray(given["hidden_states"][0].numpy()), [WORDS])
                txt_out, img_out = np.split(made[0].numpy(), [WORDS])
            after = run_block(stack, layer, Streams(img, txt), cond)
            assert relative_error(after.img, img_out) <= TOL.f32_block
            # What becomes of tokens that nobody sees is of no matter, and differs.
            assert relative_error(after.txt[:SEEN], txt_out[:SEEN]) <= TOL.f32_block
            place += 1
    assert place == len(seen) == 4


def test_the_velocity_is_diffusers(pair):
    assert relative_error(RUN(pair[1], inputs_of(), GRID), pair[3]) <= TOL.f32_run


def test_the_mask_is_what_makes_them_alike(pair):
    theirs, ours, _, velocity = pair
    latents, text = arrays()
    text[SEEN:] = np.random.default_rng(1).standard_normal((WORDS - SEEN, 24))
    unmasked = RUN(ours, inputs_of(text), GRID)
    assert relative_error(unmasked, velocity) > 1e-2
    assert relative_error(unmasked, run_theirs(theirs, latents, text, TIME, GRID, np.ones(WORDS, bool))) <= TOL.f32_run
    shorter = RUN(ours, inputs_of(arrays()[1][:SEEN]), GRID)
    assert relative_error(shorter, velocity) <= TOL.f32_run


def test_bfloat16_is_as_near_to_float32_as_diffusers_bfloat16(pair):
    _, ours, _, velocity = pair
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours)
    error = relative_error(RUN(narrow, inputs_of(), GRID).astype(jnp.float32), velocity)
    their_error = relative_error(
        run_theirs(tiny_transformer().to(torch.bfloat16), *arrays(), TIME, GRID, MASK), velocity
    )
    print(f"bfloat16 against float32: ours {error:.2e}, diffusers' {their_error:.2e}")
    assert error <= max(TOL.bf16, their_error)


def test_one_query_or_key_is_that_of_the_record_with_its_mask(pair):
    _, ours, seen, _ = pair
    cond = EMBED(ours, inputs_of(), GRID)[1]
    rng = np.random.default_rng(2)
    h = Streams(*(jnp.asarray(rng.standard_normal((rows, 32)), jnp.float32) for rows in (12, WORDS)))
    places = {"double": ((0, 3, WORDS + 3), (1, 2, 2), (1, 6, 6)), "single": ((0, 3, 3), (0, WORDS + 1, WORDS + 1))}
    for name, rows in places.items():
        stack = getattr(ours, name)
        block, joined = slice_layer(stack, 1), sequences(h, stack.groups)
        held = jax.jit(lambda joined, block=block: block(joined, cond)[1].frozen)(joined)
        for part, recorded in enumerate(block.queries_and_keys(held)):
            for group, row, place in rows:
                one, denominator = block.query_or_key(cond, held, part, 1, group, row, joined[group][row], None)
                assert relative_error(one, recorded[place, 1]) <= TOL.f32_block
                again = block.query_or_key(cond, held, part, 1, group, row, 2 * joined[group][row], denominator)[0]
                assert np.any(np.asarray(again != recorded[place, 1]))


def test_a_guidance_scale_is_refused(pair):
    with pytest.raises(ValueError, match="takes no guidance scale, but guidance was 3"):
        pair[1].embed(inputs_of()._replace(guidance=3.0), GRID)
