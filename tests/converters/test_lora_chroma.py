"""LoRAs of Chroma in diffusers' names and in the original release's change the weights that they name."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from chroma import TINY
from converters.chroma import CHROMA_DIFFUSERS, CHROMA_ORIGINAL, NUMBER, chroma_config_from_diffusers
from converters.lora import match
from converters.lora_files import read_lora
from converters.mapping import save_tree, source_shapes
from converters.merging import merge
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaMMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import random_weights
from tolerances import relative_error

ABSTRACT = abstract_module(ChromaMMDiT, chroma_config_from_diffusers(TINY))
LAYOUTS = {
    "diffusers": ("transformer.", CHROMA_DIFFUSERS, ("lora_A.weight", "lora_B.weight")),
    "release": ("diffusion_model.", CHROMA_ORIGINAL, ("lora_A.weight", "lora_B.weight")),
    "kohya": ("lora_unet_", CHROMA_ORIGINAL, ("lora_down.weight", "lora_up.weight")),
}


def tensors_of(module, table):
    """Returns the tensors of a module, without the numbers of blocks."""
    return [(key, value) for key, value in save_tree(module, table) if not key.endswith(NUMBER)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_of_every_matrix_changes_what_it_names(tmp_path, layout):
    prefix, table, halves = LAYOUTS[layout]
    shapes = {key.removesuffix(".weight"): shape for key, shape in source_shapes(table, ABSTRACT).items()}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    rng, tensors, changes = np.random.default_rng(0), {}, {}
    for name, (outer, inner) in shapes.items():
        pair = [0.3 * rng.standard_normal(shape).astype(np.float32) for shape in ((3, inner), (outer, 3))]
        written = name.replace(".", "_") if layout == "kohya" else name
        tensors |= {f"{prefix}{written}.{half}": one for half, one in zip(halves, pair, strict=True)}
        changes[f"{name}.weight"] = pair[1].astype(np.float64) @ pair[0]
    save_file(tensors, tmp_path / "x.safetensors")
    before = random_weights(ABSTRACT, 0)
    found = match("x", read_lora(tmp_path / "x.safetensors"), 0.5, {"transformer": ABSTRACT})
    after = dict(save_tree(merge(jax.tree.map(lambda leaf: leaf.copy(), before), found["transformer"]), table))
    matrices = [key for key, value in tensors_of(before, table) if value.ndim == 2]
    assert sorted(matrices) == sorted(changes)
    for key, value in tensors_of(before, table):
        assert relative_error(after[key], value + 0.5 * changes.get(key, 0)) <= 1e-6, key


@pytest.mark.parametrize(
    ("name", "inner", "outer", "said"),
    [
        ("transformer_blocks.0.norm1.linear", 32, 192, "is a LoRA of another model: none"),
        ("transformer_blocks.0.norm1.linear", 3072, 18432, "is a LoRA of another model, FLUX.1: none"),
        ("single_transformer_blocks.0.norm.linear", 32, 96, "is a LoRA of another model, FLUX.1: none"),
        # Chroma's own module in another size.
        ("single_transformer_blocks.0.proj_mlp", 64, 256, "is a LoRA of another model: it changes"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_named_as_far_as_it_tells(tmp_path, name, inner, outer, said):
    halves = {"lora_A": (3, inner), "lora_B": (outer, 3)}
    tensors = {f"transformer.{name}.{half}.weight": np.zeros(shape, np.float32) for half, shape in halves.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        match("x", read_lora(tmp_path / "x.safetensors"), 1.0, {"transformer": ABSTRACT})
