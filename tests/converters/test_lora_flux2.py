"""LoRAs of FLUX.2 in every layout change what diffusers says that they change."""

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from safetensors.numpy import save_file

from converters.flux2 import FLUX2_DIFFUSERS, FLUX2_SINGLE_FILE, flux2_config_from_diffusers
from converters.lora import match
from converters.lora_files import read_lora
from converters.mapping import ArraySource, load_tree, source_shapes
from converters.merging import merge
from difffract_jax.config import UserError
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.shapes import abstract_module
from klein import TINY, tiny_transformer
from tolerances import relative_error

RANK, ALPHA = 3, 6.0
ABSTRACT = abstract_module(Flux2MMDiT, flux2_config_from_diffusers(TINY))
UNKNOWN_TO_KOHYA = ("double_stream_modulation", "single_stream_modulation", "final_layer.adaLN")
"""Modules that diffusers does not know of in kohya's layout."""


def module_shapes(table) -> dict[str, tuple[int, ...]]:
    """Every matrix of a layout, and its shape."""
    shapes = source_shapes(table, ABSTRACT).items()
    return {key.removesuffix(".weight"): shape for key, shape in shapes if len(shape) == 2}


def factors(table, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random factors of every matrix of a layout, down and up."""
    rng = np.random.default_rng(seed)
    return {
        name: tuple(0.3 * rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, inner), (outer, RANK)))
        for name, (outer, inner) in module_shapes(table).items()
    }


def in_layout(layout: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A LoRA of every matrix in a layout, and in diffusers' by its own hand."""
    made = factors(FLUX2_DIFFUSERS if layout == "diffusers" else FLUX2_SINGLE_FILE)
    if layout == "kohya":
        made = {name: pair for name, pair in made.items() if not name.startswith(UNKNOWN_TO_KOHYA)}
        tensors = {}
        for name, (down, up) in made.items():
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            tensors |= {f"{flat}.alpha": np.array(ALPHA, np.float32)}
        convert = _convert_kohya_flux2_lora_to_diffusers
    else:
        prefix = "transformer." if layout == "diffusers" else "diffusion_model."
        halves = ("lora_A", "lora_B")
        tensors = {f"{prefix}{name}.{half}.weight": made[name][n] for name in made for n, half in enumerate(halves)}
        convert = _convert_non_diffusers_flux2_lora_to_diffusers
    if layout == "diffusers":
        return tensors, tensors
    theirs = {name: one.numpy() for name, one in convert({k: torch.from_numpy(v) for k, v in tensors.items()}).items()}
    last = "transformer.norm_out.linear.lora_B.weight"
    if last in theirs:
        # diffusers orders these rows scale, shift, the release shift, scale. diffusers swaps them in whole files of
        # FLUX.2 and in LoRAs of FLUX.1, and leaves them in LoRAs of FLUX.2.
        theirs[last] = np.concatenate(np.split(theirs[last], 2)[::-1])
    return tensors, theirs


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "ai-toolkit"])
def test_a_lora_of_every_matrix_changes_what_diffusers_says(tmp_path, layout):
    weights = {key: value.numpy() for key, value in tiny_transformer().state_dict().items()}
    tensors, theirs = in_layout(layout)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "x.safetensors")
    expected = dict(weights)
    for key in (key for key in theirs if key.endswith("lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        change = theirs[f"{name}.lora_B.weight"].astype(np.float64) @ theirs[key]
        target = f"{name.removeprefix('transformer.')}.weight"
        expected[target] = (weights[target] + 0.5 * change).astype(np.float32)
    left = {key for key in weights if key in expected and expected[key] is weights[key]}
    matrices = {key for key in weights if weights[key].ndim == 2}
    if layout == "kohya":
        assert left & matrices == {"norm_out.linear.weight"} | {key for key in matrices if "stream_modulation" in key}
    else:
        assert not left & matrices
    before, wanted = (load_tree(ArraySource("x", one), FLUX2_DIFFUSERS, ABSTRACT) for one in (weights, expected))
    changes = match("x", read_lora(tmp_path / "x.safetensors"), 0.5, {"transformer": ABSTRACT})
    after = merge(before, changes["transformer"])
    for found, leaf in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        assert relative_error(found, leaf) <= 1e-6


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        (
            "single_blocks.0.modulation.lin",
            (96, 32),
            "another model, FLUX.1: none of its 1 modules can be found in FLUX.2-klein, which has no",
        ),
        ("double_blocks.0.img_mlp.0", (128, 32), r"of shape \(128, 32\), but FLUX.2-klein's is \(192, 32\)"),
    ],
)
def test_a_lora_of_flux1_is_refused_in_a_sentence(tmp_path, name, shape, told):
    arrays = {f"diffusion_model.{name}.lora_A.weight": np.ones((RANK, shape[1]), np.float32)}
    arrays |= {f"diffusion_model.{name}.lora_B.weight": np.ones((shape[0], RANK), np.float32)}
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        match("x.safetensors", read_lora(tmp_path / "x.safetensors"), 1.0, {"transformer": ABSTRACT})
    assert str(caught.value).count(". ") == 0
