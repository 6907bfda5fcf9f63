"""The MM-DiT against diffusers' on random weights, block by block and whole; the golden data; and its own laws."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from converters.flux import FLUX_DIFFUSERS, flux_config_from_diffusers
from converters.mapping import Source, load_tree
from converters.torch_files import TransformerInputs, record_transformer
from difffract_jax.loading import load_pipeline
from difffract_jax.models.blocks import Streams
from difffract_jax.models.mmdit import Inputs, MMDiT, position_ids
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import run_stacks, sequences, slice_layer, streams
from difffract_jax.models.tiny import TINY, random_weights
from difffract_jax.ops import rope_table
from difffract_jax.sharding import make_mesh, pipeline_shardings
from tolerances import REFERENCE, TOL, relative_error

SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 12,
    "out_channels": 8,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 6,
}
CASES = {"schnell": (None, 1.0, (3, 3), 6), "schnell, tall": (None, 0.25, (5, 1), 1), "dev": (3.5, 0.75, (2, 4), 7)}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Our model, its inputs, and what PyTorch's module of the same random weights made of them."""
    guidance, t, grid, text_tokens = CASES[request.param]
    torch.manual_seed(len(request.param))
    theirs = FluxTransformer2DModel(**SMALL, guidance_embeds=guidance is not None)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if ".norm_" in name else 0.0, 0.2)
    home = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(home / "transformer")
    rng = np.random.default_rng(0)
    shapes = (grid[0] * grid[1], 12), (text_tokens, 10), (6,)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    record = record_transformer(home, TransformerInputs(*arrays, t, guidance, grid))
    config = flux_config_from_diffusers(json.loads((home / "transformer" / "config.json").read_text()))
    ours = load_tree(Source(home / "transformer"), FLUX_DIFFUSERS, abstract_module(MMDiT, config))
    scale = None if guidance is None else jnp.float32(guidance)
    return ours, Inputs(*map(jnp.asarray, arrays), jnp.float32(t), scale), grid, record


RUN, EMBED = (jax.jit(method, static_argnums=2) for method in (MMDiT.__call__, MMDiT.embed))


@jax.jit
def run_block(stack, number, h, cond):
    """Applies one block of a stack to streams, and returns what it reports too."""
    after, acts = slice_layer(stack, number)(sequences(h, stack.groups), cond)
    return streams(after, stack.groups, h), acts


def test_what_enters_the_first_block_is_diffusers(pair):
    model, inputs, grid, record = pair
    h, cond = EMBED(model, inputs, grid)
    assert relative_error(h.img, record.double[0].img) <= TOL.f32_block
    assert relative_error(h.txt, record.double[0].txt) <= TOL.f32_block
    assert relative_error(cond.vec, record.double[0].cond) <= TOL.f32_time


@pytest.mark.parametrize("number", [0, 1])
def test_every_double_block_is_diffusers(pair, number):
    model, inputs, grid, record = pair
    given, cond = record.double[number], EMBED(model, inputs, grid)[1]
    h, _ = run_block(model.double, number, Streams(given.img, given.txt), cond._replace(vec=given.cond))
    assert relative_error(h.img, given.img_out) <= TOL.f32_block
    assert relative_error(h.txt, given.txt_out) <= TOL.f32_block


@pytest.mark.parametrize("number", [0, 1])
def test_every_single_block_is_diffusers(pair, number):
    model, inputs, grid, record = pair
    given, cond = record.single[number], EMBED(model, inputs, grid)[1]
    h = Streams(*map(jnp.asarray, (given.img, given.txt)))
    h, _ = run_block(model.single, number, h, cond._replace(vec=given.cond))
    assert relative_error(h.img, given.img_out) <= TOL.f32_block
    assert relative_error(h.txt, given.txt_out) <= TOL.f32_block


def test_the_velocity_is_diffusers(pair):
    model, inputs, grid, record = pair
    velocity = RUN(model, inputs, grid)
    assert relative_error(velocity, record.velocity) <= TOL.f32_run


@pytest.fixture(scope="module")
def golden_model():
    return load_pipeline(REFERENCE / "pipeline").transformer


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(REFERENCE / "golden_forward.npz"))


def golden_inputs(golden, prompt, step):
    arrays = (
        golden[f"p{prompt}_latents"][step],
        golden[f"p{prompt}_prompt_embeds"],
        golden[f"p{prompt}_pooled"],
        golden["timesteps"][step],
    )
    return Inputs(*map(jnp.asarray, arrays))


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_blocks_are_met_one_by_one(golden_model, golden, prompt):
    step = int(golden["block_step"])
    p = f"p{prompt}"
    h, cond = EMBED(golden_model, golden_inputs(golden, prompt, step), (6, 6))
    assert relative_error(cond.vec, golden[f"{p}_temb"][step]) <= TOL.f32_block
    for stream, rows in h._asdict().items():
        assert relative_error(rows, golden[f"{p}_embed_{stream}"]) <= TOL.f32_block
    before = Streams(golden[f"{p}_embed_img"], golden[f"{p}_embed_txt"])
    for number in range(3):
        _, acts = run_block(golden_model.double, number, before, cond)
        named = {"double": acts.residual, "ff_x": acts.mlp_in, "ff_y": acts.mlp_out}
        for name, pair in named.items():
            for stream, rows in pair._asdict().items():
                assert relative_error(rows, golden[f"{p}_{name}_{stream}"][number]) <= TOL.f32_block
        before = Streams(golden[f"{p}_double_img"][number], golden[f"{p}_double_txt"][number])
    for number in range(2):
        after, _ = run_block(golden_model.single, number, Streams(*map(jnp.asarray, before)), cond)
        for stream, rows in after._asdict().items():
            assert relative_error(rows, golden[f"{p}_single_{stream}"][number]) <= TOL.f32_block
        before = Streams(golden[f"{p}_single_img"][number], golden[f"{p}_single_txt"][number])


@jax.jit
def ATTENTION(block, h, cond):
    """What a double-stream block without its MLPs adds, over the gate."""
    after, _ = block(h, cond, mlp=lambda group, x: jnp.zeros_like(x))
    gates = [stream.mod(jax.nn.silu(cond.vec)).reshape(6, -1)[2] for stream in (block.img, block.txt)]
    return Streams(*((a - b) / gate[None] for a, b, gate in zip(after, h, gates, strict=True)))


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_attention_is_met_block_by_block(golden_model, golden, prompt, x64):
    """Without its MLPs a block adds gate times attention; in float64, so that the difference keeps its digits."""
    p, step = f"p{prompt}", int(golden["block_step"])
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), golden_model)
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), golden_inputs(golden, prompt, step))
    cond = EMBED(wide, given, (6, 6))[1]
    before = Streams(golden[f"{p}_embed_img"], golden[f"{p}_embed_txt"])
    for number in range(3):
        block = slice_layer(wide.double, number)
        h = Streams(*(jnp.asarray(rows, jnp.float64) for rows in before))
        added = ATTENTION(block, h, cond)
        for name, rows in added._asdict().items():
            assert relative_error(rows, golden[f"{p}_attn_{name}"][number]) <= TOL.f32_block
        before = Streams(golden[f"{p}_double_img"][number], golden[f"{p}_double_txt"][number])


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_velocities_are_met_at_every_step(golden_model, golden, prompt):
    for step in range(4):
        velocity = RUN(golden_model, golden_inputs(golden, prompt, step), (6, 6))
        assert relative_error(velocity, golden[f"p{prompt}_velocity"][step]) <= TOL.f32_run


def test_positions_and_their_angles_are_the_golden_ones(golden):
    ids = position_ids((6, 6), 16)
    assert np.array_equal(ids, np.concatenate([golden["txt_ids"], golden["img_ids"]]))
    for ours, name in zip(rope_table(ids, (4, 6, 6), 10000.0), ("rope_cos", "rope_sin"), strict=True):
        assert relative_error(np.repeat(ours, 2, axis=1), golden[name]) <= TOL.f32_block


def tiny(dtype=jnp.float32, seed=0):
    return random_weights(abstract_module(MMDiT, TINY, dtype), seed)


def tiny_inputs(seed=0, dtype=jnp.float32, rows=6, text_tokens=5):
    rng = np.random.default_rng(seed)
    shapes = (rows, TINY.in_channels), (text_tokens, TINY.text_width), (TINY.pooled_width,)
    return Inputs(*(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes), jnp.asarray(0.5, dtype))


def test_the_scan_over_blocks_equals_a_loop(x64):
    model = tiny(jnp.float64)
    h, cond = EMBED(model, tiny_inputs(dtype=jnp.float64), (2, 3))
    scanned, kept = jax.jit(partial(run_stacks, tap=lambda visit: visit.acts.residual))(model.stacks, h, cond)
    for stack, reports, depth in zip(model.stacks, kept, (TINY.depth_double, TINY.depth_single), strict=True):
        for layer in range(depth):
            h, _ = run_block(stack, layer, h, cond)
            for report, rows in zip(reports, sequences(h, stack.groups), strict=True):
                assert relative_error(report[layer], rows) <= TOL.x64
    for ours, expected in zip(scanned, h, strict=True):
        assert relative_error(ours, expected) <= TOL.x64


@pytest.mark.slow
def test_a_batch_is_a_vmap():
    model = tiny()
    inputs = [tiny_inputs(seed) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    together = jax.jit(jax.vmap(lambda model, one: model(one, (2, 3)), (None, 0)))(model, batch)
    for alone, row in zip(inputs, together, strict=True):
        assert relative_error(row, RUN(model, alone, (2, 3))) <= TOL.f32_block


def test_where_an_image_token_stands_matters_and_where_a_text_token_stands_does_not(x64):
    model, inputs = tiny(jnp.float64), tiny_inputs(dtype=jnp.float64)
    velocity = RUN(model, inputs, (2, 3))
    assert relative_error(RUN(model, inputs, (3, 2)), velocity) > 1e-3
    turned = RUN(model, inputs._replace(latents=inputs.latents[::-1]), (2, 3))[::-1]
    assert relative_error(turned, velocity) > 1e-3
    assert relative_error(RUN(model, inputs._replace(text=inputs.text[::-1]), (2, 3)), velocity) <= TOL.x64


def test_bfloat16_weights_stay_close_to_float32_under_strict_promotion():
    rounded = tiny(jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float32)), rounded)
    inputs = tiny_inputs()
    with jax.numpy_dtype_promotion("strict"):
        ours = RUN(rounded, inputs, (2, 3))
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours.astype(jnp.float32), RUN(exact, inputs, (2, 3))) <= TOL.bf16


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(golden_model, golden):
    # The pipeline's test has a mesh of two axes.
    placed = jax.device_put(golden_model, pipeline_shardings(make_mesh({"feature": 8}))("transformer", golden_model))
    assert len(placed.double.img.mlp.up.kernel.sharding.device_set) == 8
    assert not placed.double.img.mlp.up.kernel.sharding.is_fully_replicated
    inputs = golden_inputs(golden, 0, 1)
    assert relative_error(RUN(placed, inputs, (6, 6)), RUN(golden_model, inputs, (6, 6))) <= TOL.sharded


def test_guidance_is_given_exactly_where_the_model_takes_it():
    with pytest.raises(ValueError, match="takes no guidance scale, but guidance was 3.5"):
        tiny()(tiny_inputs()._replace(guidance=jnp.float32(3.5)), (2, 3))
    dev = abstract_module(MMDiT, type(TINY)(**(vars(TINY) | {"guidance": True})))
    with pytest.raises(ValueError, match="needs a guidance scale, but guidance was None"):
        jax.eval_shape(lambda model: model(tiny_inputs(), (2, 3)), dev)
