"""The T5 encoder against PyTorch's on random weights, against the golden data, and its own laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5Config as TorchConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from converters.mapping import Source, load_tree
from converters.text_encoders import t5_config_from_transformers, t5_tables
from difffract_jax.models.t5 import T5_XXL, T5Config, T5Encoder, relative_buckets
from tolerances import REFERENCE, TOL, relative_error

# heads x d_kv differs from d_model, as it may in T5.
TINY = T5Config(vocab=50, d_model=16, d_kv=4, d_ff=24, layers=3, heads=3, buckets=8, max_distance=12)


def load(home, dtype=None):
    source = Source(home / "model.safetensors")
    config = t5_config_from_transformers(json.loads((home / "config.json").read_text()))
    rules, ignored = t5_tables(source.shapes())
    abstract = jax.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
    return load_tree(source, rules, abstract, ignored=ignored, dtype=dtype)


def tiny(seed, dtype=jnp.float32):
    """A small random model; under jit, because drawing leaf by leaf compiles every draw by itself."""
    return jax.jit(lambda: T5Encoder(TINY, rngs=nnx.Rngs(seed), dtype=dtype))()


def random_torch(projection, buckets):
    torch.manual_seed(len(projection) + buckets)
    config = TorchConfig(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=3,
        num_heads=3,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=12,
        feed_forward_proj=projection,
    )
    model = T5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.5)
    return model


@pytest.mark.parametrize("length", [1, 7, 30])
@pytest.mark.parametrize(("projection", "buckets"), [("gated-gelu", 8), ("relu", 16)])
def test_random_weights_give_what_pytorch_gives(tmp_path, projection, buckets, length):
    model = random_torch(projection, buckets)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = np.random.default_rng(length).integers(0, 50, length)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])[0][0]
    assert relative_error(jax.jit(T5Encoder.__call__)(ours, ids), expected) <= TOL.f32_block


@pytest.mark.parametrize("prompt", ["p0", "p1"])
def test_golden_prompt_embeddings_are_met(prompt):
    home = REFERENCE / "pipeline" / "text_encoder_2"
    golden = np.load(REFERENCE / "golden_forward.npz")
    ours = jax.jit(T5Encoder.__call__)(load(home), golden[f"{prompt}_t5_input_ids"])
    assert relative_error(ours, golden[f"{prompt}_prompt_embeds"]) <= TOL.f32_block


@pytest.mark.parametrize(("length", "buckets", "max_distance"), [(1, 32, 128), (600, 32, 128), (90, 8, 20)])
def test_position_buckets_are_those_of_pytorch(length, buckets, max_distance):
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, max_distance)
    np.testing.assert_array_equal(relative_buckets(length, buckets, max_distance), expected.numpy())


def test_the_scan_over_layers_equals_a_loop():
    encoder = tiny(0)
    ids = jnp.arange(9)
    x = encoder.embed.embedding[ids]
    block, bias = jax.jit(lambda block, *given: block(*given)), encoder._bias(9)
    for layer in range(TINY.layers):
        x = block(jax.tree.map(lambda leaf, layer=layer: leaf[layer], encoder.blocks), x, bias)
    assert relative_error(jax.jit(T5Encoder.__call__)(encoder, ids), encoder.final_norm(x)) <= TOL.f32_block


@pytest.mark.slow
def test_a_batch_is_a_vmap():
    encoder = tiny(1)
    ids = jnp.arange(12).reshape(2, 6)
    batch = jax.vmap(encoder)(ids)
    assert relative_error(batch[1], encoder(ids[1])) <= TOL.f32_block


def test_float64_weights_compute_in_float64(x64):
    result = jax.eval_shape(lambda: T5Encoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.float64)(jnp.arange(5)))
    assert result.dtype == jnp.float64


def test_bfloat16_weights_stay_close_to_float32_under_strict_promotion():
    rounded = tiny(2, jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float32)), rounded)
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(T5Encoder.__call__)(rounded, jnp.arange(8))
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours.astype(jnp.float32), exact(jnp.arange(8))) <= TOL.bf16


def test_a_checkpoint_loaded_in_bfloat16_computes_in_bfloat16():
    ours = load(REFERENCE / "pipeline" / "text_encoder_2", dtype=jnp.bfloat16)
    assert jax.eval_shape(ours, jnp.arange(5)).dtype == jnp.bfloat16


def test_the_encoder_of_flux_has_its_known_number_of_parameters():
    leaves = jax.tree.leaves(jax.eval_shape(lambda: T5Encoder(T5_XXL, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in leaves) == 4_762_310_656
