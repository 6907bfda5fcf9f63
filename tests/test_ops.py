"""The pure maths against PyTorch's and diffusers' functions, and its laws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from difffract_jax import ops
from difffract_jax.ops import (
    attend,
    attention_pattern,
    film,
    layer_norm,
    rms_norm,
    root_norm,
    rope_table,
    rotate,
    sinusoid,
    standardise,
    widen,
)
from tolerances import TOL, relative_error


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_the_layer_norm_is_pytorch_s_and_tells_its_scale():
    x = 3 * normal(5, 8) + 1
    ours, inv_std = layer_norm(jnp.asarray(x))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,), eps=1e-6)
    assert relative_error(ours, expected) <= TOL.f32_block
    assert relative_error(inv_std, 1 / np.sqrt(x.var(axis=1) + 1e-6)) <= TOL.f32_block


def test_with_its_scale_frozen_the_layer_norm_is_linear(x64):
    x, y = (jnp.asarray(normal(5, 8, seed=s, dtype=np.float64)) for s in (0, 1))
    scale = layer_norm(x)[1]
    frozen = [layer_norm(rows, scale)[0] for rows in (x, y, 2 * x - 3 * y)]
    assert relative_error(frozen[2], 2 * frozen[0] - 3 * frozen[1]) <= TOL.x64
    assert relative_error(layer_norm(y)[0], frozen[1]) > 1e-3


def test_the_rms_norm_is_pytorch_s():
    x, scale = normal(3, 2, 8), 1 + normal(8, seed=1)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (8,), torch.from_numpy(scale), eps=1e-6)
    assert relative_error(rms_norm(jnp.asarray(x), jnp.asarray(scale)), expected) <= TOL.f32_block


def test_an_rms_norm_tells_its_scale_and_is_linear_with_a_held_one(x64):
    x, y, scale = (
        jnp.asarray(normal(*shape, seed=seed, dtype=np.float64)) for seed, shape in enumerate(((3, 8),) * 2 + ((8,),))
    )
    made, held = root_norm(x, scale, eps=1e-5)
    assert relative_error(made, rms_norm(x, scale, 1e-5)) <= TOL.x64
    frozen = [root_norm(one, scale, held)[0] for one in (x, y, 2 * x - 3 * y)]
    assert (
        relative_error(frozen[0], made) <= TOL.x64
        and relative_error(frozen[2], 2 * frozen[0] - 3 * frozen[1]) <= TOL.x64
    )
    assert relative_error(root_norm(y, scale)[0], frozen[1]) > 1e-3


def test_standardised_rows_have_mean_0_and_variance_1(x64):
    rows = standardise(jnp.asarray(5 + 2 * normal(4, 9, dtype=np.float64)), (-1,), 0.0)
    assert np.abs(rows.mean(axis=-1)).max() <= TOL.x64
    assert np.abs(rows.var(axis=-1) - 1).max() <= TOL.x64


@pytest.mark.parametrize("widths", [(4, 6, 6), (16, 56, 56)])
def test_angles_and_rotations_are_diffusers(widths):
    ids = np.random.default_rng(0).integers(0, 64, (7, 3)).astype(np.float64)
    cos, sin = rope_table(ids, widths, 10000.0)
    theirs = FluxPosEmbed(10000, list(widths))(torch.from_numpy(ids))
    for ours, table in zip((cos, sin), theirs, strict=True):
        assert relative_error(np.repeat(ours, 2, axis=1), table) <= TOL.f32_block
    x = normal(7, 2, sum(widths))
    expected = apply_rotary_emb(torch.from_numpy(x)[None], theirs, sequence_dim=1)[0]
    ours = rotate(jnp.asarray(x), jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32))
    assert relative_error(ours, expected) <= TOL.f32_block


def test_a_score_depends_on_where_two_positions_lie_to_one_another(x64):
    q, k = (jnp.asarray(normal(1, 1, 16, seed=s, dtype=np.float64)) for s in (0, 1))

    def score(a, b):
        tables = [map(jnp.asarray, rope_table(np.array([place]), (4, 6, 6), 10000.0)) for place in (a, b)]
        turned = [rotate(x, *table) for x, table in zip((q, k), tables, strict=True)]
        return float(jnp.sum(turned[0] * turned[1]))

    here = score((0.0, 2.0, 5.0), (0.0, 1.0, 7.0))
    assert abs(here - score((3.0, 12.0, 15.0), (3.0, 11.0, 17.0))) <= TOL.x64
    assert abs(here - score((0.0, 2.0, 5.0), (0.0, 2.0, 7.0))) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_pytorch_s(masked):
    q, k, v = (normal(rows, 2, 8, seed=s) for s, rows in enumerate((3, 5, 5)))
    bias = np.where(np.arange(5)[None, None] > np.arange(3)[None, :, None] + 1, -np.inf, 0.0).astype(np.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(0, 1) for x in (q, k, v)),
        attn_mask=torch.from_numpy(bias) if masked else None,
    ).transpose(0, 1)
    given = bias if masked else None
    ours = attend(*map(jnp.asarray, (q, k, v)), scale=8**-0.5, bias=given)
    assert relative_error(ours, expected) <= TOL.f32_block
    pattern = attention_pattern(jnp.asarray(q), jnp.asarray(k), scale=8**-0.5, bias=given)
    assert relative_error(pattern.sum(axis=-1), np.ones((2, 3))) <= TOL.f32_block


@pytest.mark.parametrize(("queries", "masked"), [(37, True), pytest.param(40, False, marks=pytest.mark.slow)])
def test_attention_in_blocks_is_attention_as_a_whole(x64, monkeypatch, queries, masked):
    q, k, v, cotangent = (
        jnp.asarray(normal(n, 3, 8, seed=s, dtype=np.float64)) for s, n in enumerate((queries, 23, 23, queries))
    )
    bias = np.where(np.arange(23)[None, None] > np.arange(queries)[None, :, None] + 5, -np.inf, 0.0) if masked else None

    def both_ways():
        def program(q, k, v):  # a new one each time, since the sizes below are read when it is traced
            mixed, pull = jax.vjp(lambda q, k, v: attend(q, k, v, scale=8**-0.5, bias=bias), q, k, v)
            together = jax.vmap(pull)(jnp.stack([cotangent, 2 * cotangent]))
            return mixed, *pull(cotangent), *together

        return jax.jit(program)(q, k, v)

    whole = both_ways()
    monkeypatch.setattr(ops, "WHOLE_PATTERN", 0)
    for size in (2**20, 23 * 8 * 9):  # a head at a time; blocks that leave a remainder
        monkeypatch.setattr(ops, "PATTERN_BLOCK", size)
        for ours, expected in zip(both_ways(), whole, strict=True):
            assert relative_error(ours, expected) <= 1e-12  # a few sums of 23 terms in another order


def test_no_pattern_above_the_limit_is_ever_whole(monkeypatch):
    q, k, v = (jnp.asarray(normal(512, 4, 8, seed=s)) for s in range(3))

    def bytes_needed():
        def pulled(q, k, v, cotangent):
            return jax.vjp(lambda v: attend(q, k, v, scale=8**-0.5), v)[1](cotangent)

        return jax.jit(pulled).lower(q, k, v, q).compile().memory_analysis().temp_size_in_bytes

    whole = 512 * 512 * 4 * 4
    assert bytes_needed() >= whole
    monkeypatch.setattr(ops, "WHOLE_PATTERN", whole - 1)
    monkeypatch.setattr(ops, "PATTERN_BLOCK", whole // 64)
    assert bytes_needed() <= whole / 4


@pytest.mark.parametrize(("order", "flip", "shift"), [("cos_sin", True, 0), ("sin_cos", False, 1)])
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, 31.0])
def test_both_embeddings_of_time_are_diffusers(order, flip, shift, t):
    expected = get_timestep_embedding(torch.tensor([t]), 32, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert relative_error(sinusoid(jnp.float32(t), 32, order), expected[0]) <= TOL.f32_block


def test_the_embedding_of_time_is_exact_in_float64(x64):
    ours = sinusoid(jnp.asarray(750.0), 8, "cos_sin")
    angles = [750 * math.exp(-math.log(10000) * i / 4) for i in range(4)]
    assert relative_error(ours, [*map(math.cos, angles), *map(math.sin, angles)]) <= TOL.x64


def test_film_scales_around_1_and_shifts(x64):
    x, scale, shift = (jnp.asarray(normal(*s, dtype=np.float64)) for s in ((3, 4), (4,), (4,)))
    assert relative_error(film(x, scale, shift), x * (1 + scale)[None] + shift[None]) <= TOL.x64


def test_widening_goes_to_float32_at_least(x64):
    kinds = {jnp.bfloat16: jnp.float32, jnp.float32: jnp.float32, jnp.float64: jnp.float64}
    assert {kind: jax.eval_shape(lambda k=kind: widen(jnp.ones(2, k))).dtype for kind in kinds} == kinds
