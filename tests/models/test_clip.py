"""The CLIP text encoder against PyTorch's on random weights, against the golden data, and its own laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPTextConfig, CLIPTextModel

from converters.mapping import Source, load_tree
from converters.text_encoders import clip_config_from_transformers, clip_tables
from difffract_jax.models.clip import CLIP_L, CLIPConfig, CLIPTextEncoder
from tolerances import REFERENCE, TOL, relative_error

TINY = CLIPConfig(vocab=40, d_model=12, d_ff=20, layers=2, heads=3, positions=10)
EOS = 39


def load(home):
    source = Source(home / "model.safetensors")
    config = clip_config_from_transformers(json.loads((home / "config.json").read_text()))
    rules, ignored = clip_tables(source.shapes())
    abstract = jax.eval_shape(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))
    return load_tree(source, rules, abstract, ignored=ignored)


def tiny(seed, dtype=jnp.float32):
    """A small random model; under jit, because drawing leaf by leaf compiles every draw by itself."""
    return jax.jit(lambda: CLIPTextEncoder(TINY, rngs=nnx.Rngs(seed), dtype=dtype))()


def random_torch(activation, eos):
    torch.manual_seed(eos)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=10,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=eos,
    )
    model = CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.4)
    return model


@pytest.mark.parametrize("length", [4, 10])
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", 30)])
def test_random_weights_give_what_pytorch_gives(tmp_path, activation, eos, length):
    model = random_torch(activation, eos)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = np.random.default_rng(length).integers(3, 30, length)
    # Both the end token of the configuration and the largest id, at places that differ, each followed by a copy.
    ids[1:3], ids[3] = (eos if eos != 2 else EOS), EOS
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])
    last_hidden, pooled = jax.jit(CLIPTextEncoder.__call__)(ours, ids)
    assert relative_error(last_hidden, expected.last_hidden_state[0]) <= TOL.f32_block
    assert relative_error(pooled, expected.pooler_output[0]) <= TOL.f32_block


@pytest.mark.parametrize("prompt", ["p0", "p1"])
def test_golden_pooled_vectors_are_met(prompt):
    home = REFERENCE / "pipeline" / "text_encoder"
    golden = np.load(REFERENCE / "golden_forward.npz")
    _, pooled = jax.jit(CLIPTextEncoder.__call__)(load(home), golden[f"{prompt}_clip_input_ids"])
    assert relative_error(pooled, golden[f"{prompt}_pooled"]) <= TOL.f32_block


def test_no_token_sees_a_later_one():
    encoder = tiny(0)
    early, late = np.arange(8), np.array([0, 1, 2, 3, 4, 20, 6, 7])
    encode = jax.jit(CLIPTextEncoder.__call__)
    difference = jnp.abs(encode(encoder, early)[0] - encode(encoder, late)[0]).max(axis=-1)
    assert not difference[:5].any()
    assert difference[5:].all()


def test_the_scan_over_layers_equals_a_loop():
    encoder = tiny(0)
    ids = jnp.arange(9)
    x = encoder.embed(ids) + encoder.positions(jnp.arange(9))
    block = jax.jit(lambda block, x: block(x))
    for layer in range(TINY.layers):
        x = block(jax.tree.map(lambda leaf, layer=layer: leaf[layer], encoder.blocks), x)
    states, _ = jax.jit(CLIPTextEncoder.__call__)(encoder, ids)
    assert relative_error(states, encoder.final_norm(x)) <= TOL.f32_block


@pytest.mark.slow
def test_a_batch_is_a_vmap():
    encoder = tiny(1)
    ids = jnp.arange(12).reshape(2, 6)
    assert relative_error(jax.vmap(encoder)(ids)[1][1], encoder(ids[1])[1]) <= TOL.f32_block


def test_float64_weights_compute_in_float64(x64):
    results = jax.eval_shape(lambda: CLIPTextEncoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.float64)(jnp.arange(5)))
    assert [result.dtype for result in results] == [jnp.float64] * 2


def test_bfloat16_weights_stay_close_to_float32_under_strict_promotion():
    rounded = tiny(2, jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float32)), rounded)
    with jax.numpy_dtype_promotion("strict"):
        _, pooled = jax.jit(CLIPTextEncoder.__call__)(rounded, jnp.arange(8))
    assert pooled.dtype == jnp.bfloat16
    assert (
        relative_error(pooled.astype(jnp.float32), jax.jit(CLIPTextEncoder.__call__)(exact, jnp.arange(8))[1])
        <= TOL.bf16
    )


def test_more_ids_than_positions_are_refused():
    with pytest.raises(ValueError, match="given 11 token ids, but has 10 positions"):
        tiny(0)(jnp.arange(11))


def test_the_encoder_of_flux_has_its_known_number_of_parameters():
    leaves = jax.tree.leaves(jax.eval_shape(lambda: CLIPTextEncoder(CLIP_L, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in leaves) == 123_060_480
