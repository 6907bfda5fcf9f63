"""FLUX.2's transformer against diffusers' on random weights, block by block and whole, and its own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.flux2 import FLUX2_DIFFUSERS, flux2_config_from_diffusers
from converters.mapping import ArraySource, load_tree
from difffract_jax.models.blocks import Streams
from difffract_jax.models.flux2 import Flux2MMDiT, flux2_position_ids
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import sequences, slice_layer, streams
from klein import TINY, run_theirs, tiny_transformer
from tolerances import TOL, relative_error

GRID, WORDS, TIME = (3, 4), 5, 0.8


def convert(theirs, dtype=jnp.float32):
    arrays = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    config = flux2_config_from_diffusers(TINY)
    return load_tree(ArraySource("tiny", arrays), FLUX2_DIFFUSERS, abstract_module(Flux2MMDiT, config, dtype))


@pytest.fixture(scope="module")
def theirs():
    return tiny_transformer()


@pytest.fixture(scope="module")
def ours(theirs):
    return convert(theirs)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((12, 16), (WORDS, 48))]


@pytest.fixture(scope="module")
def recorded(theirs, given):
    """What entered and left each of diffusers' blocks: the text stream and the image stream, or the joint sequence."""
    seen = {"double": [], "single": []}

    def keep(kind):
        def hook(_, args, kwargs, out):
            values = [*args, *kwargs.values()]
            seen[kind].append(([kwargs["hidden_states"], kwargs["encoder_hidden_states"], values], out))

        return hook

    handles = [block.register_forward_hook(keep("double"), with_kwargs=True) for block in theirs.transformer_blocks]
    handles += [
        block.register_forward_hook(keep("single"), with_kwargs=True) for block in theirs.single_transformer_blocks
    ]
    velocity = run_theirs(theirs, *given, TIME, GRID)
    for handle in handles:
        handle.remove()
    return seen, velocity


def inputs_of(given, dtype=jnp.float32):
    return Inputs(*map(jnp.asarray, given), jnp.zeros(0, dtype), jnp.float32(TIME))


RUN, EMBED = (jax.jit(method, static_argnums=2) for method in (MMDiT.__call__, Flux2MMDiT.embed))


@jax.jit
def run_block(stack, number, h, cond):
    after, _ = slice_layer(stack, number)(sequences(h, stack.groups), cond)
    return streams(after, stack.groups, h)


def array(tensor):
    return jnp.asarray(tensor[0].numpy())


@pytest.mark.parametrize("number", [0, 1])
def test_every_double_block_is_diffusers(ours, given, recorded, number):
    (img, txt, _), (txt_out, img_out) = recorded[0]["double"][number]
    after = run_block(ours.double, number, Streams(array(img), array(txt)), EMBED(ours, inputs_of(given), GRID)[1])
    assert relative_error(after.img, array(img_out)) <= TOL.f32_block
    assert relative_error(after.txt, array(txt_out)) <= TOL.f32_block


@pytest.mark.parametrize("number", [0, 1])
def test_every_single_block_is_diffusers(ours, given, recorded, number):
    (joint, _, _), out = recorded[0]["single"][number]
    joint, out = array(joint), array(out)
    h = Streams(img=joint[WORDS:], txt=joint[:WORDS])
    after = run_block(ours.single, number, h, EMBED(ours, inputs_of(given), GRID)[1])
    assert relative_error(jnp.concatenate([after.txt, after.img]), out) <= TOL.f32_block


def test_the_velocity_is_diffusers(ours, given, recorded):
    assert relative_error(RUN(ours, inputs_of(given), GRID), recorded[1]) <= TOL.f32_run


def test_bfloat16_is_as_near_to_float32_as_diffusers_bfloat16(theirs, ours, given, recorded):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours)
    error = relative_error(RUN(narrow, inputs_of(given, jnp.bfloat16), GRID).astype(jnp.float32), recorded[1])
    their_error = relative_error(run_theirs(tiny_transformer().to(torch.bfloat16), *given, TIME, GRID), recorded[1])
    print(f"bfloat16 against float32: ours {error:.2e}, diffusers' {their_error:.2e}")
    assert error <= max(TOL.bf16, their_error)


def test_one_modulation_serves_all_blocks_of_a_kind(ours, given):
    """Blocks hold no modulation, and what embeds computes is what every block is given."""
    _, cond = EMBED(ours, inputs_of(given), GRID)
    assert not [name for name in ("mod", "bias") if hasattr(ours.double.img, name)]
    for kind, shared in (("double", cond.mod.double), ("single", cond.mod.single)):
        stack = getattr(ours, kind)
        gates = [slice_layer(stack, number).gates(cond) for number in (0, 1)]
        assert all(bool(jnp.array_equal(a, b)) for a, b in zip(*gates, strict=True))
        assert jax.tree.leaves(shared)[0].shape[-1] == 32


def test_positions_have_rows_and_columns_in_the_image_and_words_in_the_text():
    ids = flux2_position_ids((2, 3), 4)
    assert ids[:4].tolist() == [[0, 0, 0, n] for n in range(4)]
    assert ids[4:].tolist() == [[0, row, column, 0] for row in range(2) for column in range(3)]


def test_guidance_is_refused(ours, given):
    with pytest.raises(ValueError, match="takes no guidance scale"):
        ours(inputs_of(given)._replace(guidance=jnp.float32(3.5)), GRID)
