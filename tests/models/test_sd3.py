"""Stable Diffusion 3's transformers against diffusers' on random weights, whole and block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.mapping import ArraySource, load_tree
from converters.sd3 import SD3_DIFFUSERS, sd3_config_from_diffusers, sd3_labels
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Streams
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import sequences, slice_layer, streams
from sd3 import TINY, run_theirs, tiny_transformer
from tolerances import TOL, relative_error

GRID, WORDS, TIME = (3, 4), 5, 0.8
SHAPES = ((12, 16), (WORDS, 48), (24,))


def convert(name, theirs, dtype=jnp.float32):
    arrays = {key: tensor.float().numpy() for key, tensor in theirs.state_dict().items()}
    config = sd3_config_from_diffusers(TINY[name])
    abstract = abstract_module(Sd3MMDiT, config, dtype)
    return load_tree(ArraySource("tiny", arrays), SD3_DIFFUSERS, abstract, labels=sd3_labels(config))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in TINY if name != "sd3.5-medium"]


@pytest.fixture(scope="module", params=["sd3.5-medium", *OTHERS])
def pair(request):
    """Both modules of a variant, what enters and leaves every block of diffusers', and its velocity."""
    theirs, seen = tiny_transformer(request.param), []

    def keep(_, args, given, made):
        seen.append((given["hidden_states"], given["encoder_hidden_states"], *made))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in theirs.transformer_blocks]
    velocity = run_theirs(theirs, *inputs(), TIME, GRID)
    for handle in handles:
        handle.remove()
    return request.param, theirs, convert(request.param, theirs), seen, velocity


def inputs():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def inputs_of(dtype=jnp.float32):
    return Inputs(*map(jnp.asarray, inputs()), jnp.asarray(TIME, jnp.float32))


RUN, EMBED = (jax.jit(method, static_argnums=2) for method in (Sd3MMDiT.__call__, Sd3MMDiT.embed))


@jax.jit
def run_block(stack, number, h, cond):
    after, _ = slice_layer(stack, number)(sequences(h, stack.groups), cond)
    return streams(after, stack.groups, h)


def test_every_block_is_diffusers(pair):
    _, _, ours, seen, _ = pair
    cond, number = EMBED(ours, inputs_of(), GRID)[1], 0
    for stack in ours.stacks:
        for layer in range(stack.img.mod.kernel.shape[0]):
            img, txt, txt_out, img_out = (None if one is None else jnp.asarray(one[0].numpy()) for one in seen[number])
            after = run_block(stack, layer, Streams(img, txt), cond)
            assert relative_error(after.img, img_out) <= TOL.f32_block
            assert txt_out is None or relative_error(after.txt, txt_out) <= TOL.f32_block
            number += 1
    assert number == len(seen) == 3


def test_the_velocity_is_diffusers(pair):
    assert relative_error(RUN(pair[2], inputs_of(), GRID), pair[4]) <= TOL.f32_run


def test_bfloat16_is_as_near_to_float32_as_diffusers_bfloat16(pair):
    name, _, ours, _, velocity = pair
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours)
    error = relative_error(RUN(narrow, inputs_of(), GRID).astype(jnp.float32), velocity)
    their_error = relative_error(run_theirs(tiny_transformer(name).to(torch.bfloat16), *inputs(), TIME, GRID), velocity)
    print(f"{name}, bfloat16 against float32: ours {error:.2e}, diffusers' {their_error:.2e}")
    assert error <= max(TOL.bf16, their_error)


def test_an_image_beyond_the_table_of_positions_is_one_sentence(pair):
    given = inputs_of()._replace(latents=jnp.zeros((9, 16)))
    with pytest.raises(UserError, match="positions for 8 x 8 image tokens .* but the image has 9 x 1; take a smaller"):
        pair[2](given, (9, 1))


@pytest.mark.slow
def test_one_query_or_key_is_that_of_the_record_with_norms_and_without(pair):
    _, _, ours, seen, _ = pair
    block, cond = slice_layer(ours.double, 0), EMBED(ours, inputs_of(), GRID)[1]
    h = Streams(*(jnp.asarray(one[0].numpy()) for one in seen[-2][:2]))
    held = jax.jit(lambda h: block(h, cond)[1].frozen)(h)
    for part, recorded in enumerate(block.queries_and_keys(held)):
        for group, row, place in ((0, 3, WORDS + 3), (1, 2, 2)):
            one, denominator = block.query_or_key(cond, held, part, 1, group, row, h[group][row], None)
            assert relative_error(one, recorded[place, 1]) <= TOL.f32_block
            again = block.query_or_key(cond, held, part, 1, group, row, 2 * h[group][row], denominator)[0]
            assert relative_error(again, recorded[place, 1]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["sd3.5-medium"], indirect=True)
def test_heads_of_both_attentions_are_told_apart_and_scores_are_refused(pair):
    _, _, ours, seen, _ = pair
    block, cond = slice_layer(ours.dual, 0), EMBED(ours, inputs_of(), GRID)[1]
    h = Streams(*(jnp.asarray(one[0].numpy()) for one in seen[0][:2]))

    @jax.jit
    def image(joint, own):
        heads = jnp.array([joint, joint, own, own])
        return block(h, cond, heads=heads, mlp=lambda _, x: jnp.zeros_like(x))[0].img

    both, joint, own, none = (image(*pair) for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)))
    assert relative_error(both - joint, own - none) <= TOL.f32_block
    assert relative_error(both, joint) > 1e-2 and relative_error(both, own) > 1e-2
    held = block(h, cond)[1].frozen
    assert block.attention_shape(held) == (WORDS + 12, 4, 16)
    for refused in (
        block.queries_and_keys,
        lambda held: block(h, cond, scores=jnp.zeros((4, WORDS + 12, WORDS + 12))),
        block.query_or_key,
    ):
        with pytest.raises(UserError, match="not explained as yet in a model whose blocks attend twice"):
            refused(held)
