"""LoRAs of Z-Image in diffusers' names change the weights that they name."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from zimage import TINY

from converters.lora import match
from converters.lora_files import read_lora
from converters.mapping import save_tree, source_shapes
from converters.merging import merge
from converters.zimage import ZIMAGE_DIFFUSERS, zimage_config_from_diffusers
from difffract_jax.config import UserError
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import random_weights
from difffract_jax.models.zimage import ZImageMMDiT
from tolerances import relative_error

ABSTRACT = abstract_module(ZImageMMDiT, zimage_config_from_diffusers(TINY))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_a_lora_of_every_matrix_changes_what_it_names(tmp_path, prefix):
    shapes = source_shapes(ZIMAGE_DIFFUSERS, ABSTRACT)
    rng, tensors, changes = np.random.default_rng(0), {}, {}
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2:
            down, up = (rng.standard_normal(size).astype(np.float32) for size in ((3, shape[1]), (shape[0], 3)))
            name = prefix + key.removesuffix(".weight")
            tensors |= {f"{name}.lora_A.weight": 0.3 * down, f"{name}.lora_B.weight": 0.3 * up}
            changes[key] = 0.09 * up.astype(np.float64) @ down
    save_file(tensors, tmp_path / "x.safetensors")
    before = random_weights(ABSTRACT, 0)
    found = match("x", read_lora(tmp_path / "x.safetensors"), 0.5, {"transformer": ABSTRACT})
    merged = merge(jax.tree.map(lambda leaf: leaf.copy(), before), found["transformer"])
    after = dict(save_tree(merged, ZIMAGE_DIFFUSERS))
    assert len(changes) == 7 * 6 + 4 + 6, "seven matrices in six blocks, four modulations, six around them"
    for key, value in save_tree(before, ZIMAGE_DIFFUSERS):
        assert relative_error(after[key], value + 0.5 * changes.get(key, 0)) <= 1e-6, key


@pytest.mark.parametrize(
    ("name", "inner", "said"),
    [
        ("single_transformer_blocks.0.norm.linear", 32, "is a LoRA of another model, FLUX.1: none .* found in Z-Image"),
        ("layers.0.attention.to_q", 64, "is a LoRA of another model: it changes"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, name, inner, said):
    halves = {"lora_A": (3, inner), "lora_B": (96, 3)}
    tensors = {f"transformer.{name}.{half}.weight": np.zeros(shape, np.float32) for half, shape in halves.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        match("x", read_lora(tmp_path / "x.safetensors"), 1.0, {"transformer": ABSTRACT})
