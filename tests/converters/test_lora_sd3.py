"""LoRAs of Stable Diffusion 3 in every layout change what diffusers' own conversion says that they change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.numpy import save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from converters.lora import match
from converters.lora_files import read_lora
from converters.mapping import ArraySource, load_tree, save_tree, source_shapes
from converters.merging import merge
from converters.sd3 import SD3_DIFFUSERS, SD3_RELEASE, sd3_config_from_diffusers, sd3_labels
from converters.text_encoders import t5_tables, two_clip_tables
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.loading import load_pipeline
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.streaming import whole
from difffract_jax.storage.checkpoint import leaf_paths
from sd3 import TINY, tiny_pipeline, tiny_transformer
from tolerances import relative_error

RANK, ALPHA, SCALE = 3, 6.0, 0.5
OF_DIFFUSERS, OF_RELEASE = "diffusers", "release"
LAYOUTS = {
    "diffusers": (OF_DIFFUSERS, "transformer.{}", "."),
    "peft": (OF_DIFFUSERS, "base_model.model.{}", "."),
    "onetrainer": (OF_DIFFUSERS, "lora_transformer_{}", "_"),
    "kohya": (OF_RELEASE, "lora_unet_{}", "_"),
    "comfyui": (OF_RELEASE, "diffusion_model.{}", "."),
}
"""Layout -> whose names it has, what stands before them, and what joins their parts."""


class Model:
    """A tiny transformer of a variant, in either layout."""

    def __init__(self, name: str) -> None:
        shape = sd3_config_from_diffusers(TINY[name])
        self.abstract, self.labels = abstract_module(Sd3MMDiT, shape), sd3_labels(shape)
        self.weights = {key: value.numpy() for key, value in tiny_transformer(name).state_dict().items()}
        self.module = self.made(self.weights)

    def made(self, weights):
        """Ours of weights in diffusers' layout."""
        return load_tree(ArraySource("x", weights), SD3_DIFFUSERS, self.abstract, labels=self.labels)

    def tensors(self, whose: str) -> dict[str, np.ndarray]:
        """The weights in a layout, in float64."""
        table = SD3_DIFFUSERS if whose == OF_DIFFUSERS else SD3_RELEASE
        return {key: np.asarray(one, np.float64) for key, one in save_tree(self.module, table, self.labels)}


def factors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random factors, down and up, of every matrix and convolution."""
    rng = np.random.default_rng(seed)
    made = {}
    for key, (outer, *inner) in shapes.items():
        ones = (1,) * (len(inner) - 1)
        pair = (rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, *inner), (outer, RANK, *ones)))
        made[key.removesuffix(".weight")] = tuple(0.3 * one for one in pair)
    return made


def product(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """up @ down in float64, in the shape of the weight."""
    flat = up.reshape(len(up), -1).astype(np.float64) @ down.reshape(len(down), -1).astype(np.float64)
    return flat.reshape(len(up), *down.shape[1:])


def saved(path, made, layout: str):
    """Writes a LoRA in a layout, its alpha beside it."""
    _, prefix, joint = LAYOUTS[layout]
    halves = ("lora_down", "lora_up") if joint == "_" else ("lora_A", "lora_B")
    tensors = {}
    for name, pair in made.items():
        full = prefix.format(name.replace(".", joint))
        tensors |= {f"{full}.{half}.weight": one for half, one in zip(halves, pair, strict=True)}
        tensors[f"{full}.alpha"] = np.array(ALPHA, np.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["sd3.5-medium", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3-medium", "sd3.5-large"))]
)
def test_a_lora_of_every_matrix_changes_what_diffusers_says(tmp_path, name, layout):
    model, whose = Model(name), LAYOUTS[layout][0]
    tensors = model.tensors(whose)
    shapes = {key: one.shape for key, one in tensors.items() if one.ndim in (2, 4)}
    made = factors(shapes)
    file = saved(tmp_path / "x.safetensors", made, layout)
    changes = match("x", read_lora(file), SCALE, {"transformer": model.abstract})
    after = merge(model.made(model.weights), changes["transformer"])
    expected = dict(tensors)
    for module, (down, up) in made.items():
        expected[f"{module}.weight"] = tensors[f"{module}.weight"] + SCALE * ALPHA / RANK * product(down, up)
    if whose == OF_RELEASE:
        given = {key: torch.from_numpy(np.ascontiguousarray(one)) for key, one in expected.items()}
        expected = {key: one.numpy() for key, one in convert_sd3_transformer_checkpoint_to_diffusers(given).items()}
    found = dict(save_tree(after, SD3_DIFFUSERS, model.labels))
    assert found.keys() == expected.keys() == model.weights.keys()
    for key, one in found.items():
        assert relative_error(one, expected[key]) <= 1e-6, key
        changed = relative_error(one, model.weights[key]) > 1e-3
        assert changed == (one.ndim in (2, 4)), key


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("sd3") / "diffusers"
    tiny_pipeline("sd3.5-medium").save_pretrained(made)
    return made


ENCODERS = {
    "text_encoder": ("lora_te1_", "text_encoders.clip_l.transformer.", CLIPTextModelWithProjection),
    "text_encoder_2": ("lora_te2_", "text_encoders.clip_g.transformer.", CLIPTextModelWithProjection),
    "text_encoder_3": ("lora_te3_", "text_encoders.t5xxl.transformer.", T5EncoderModel),
}
"""Folder -> what stands before its modules in kohya's layout and in ComfyUI's, and transformers' class."""
READ_ALONE = re.compile("embed|shared|relative_attention_bias")


def text_lora(home, path, layout: str):
    """Writes a LoRA of every matrix of the three text encoders; returns its factors by folder and module."""
    tensors, made = {}, {}
    for seed, (folder, (kohya, comfyui, cls)) in enumerate(ENCODERS.items()):
        theirs = cls.from_pretrained(home / folder).state_dict()
        shapes = {key: tuple(one.shape) for key, one in theirs.items() if one.ndim == 2 and not READ_ALONE.search(key)}
        made[folder] = factors(shapes, seed)
        for name, pair in made[folder].items():
            # Names of CLIP's modules in files are of before transformers 5, with `text_model.`.
            full = name if "block" in name or "projection" in name else f"text_model.{name.removeprefix('text_model.')}"
            full = {
                "diffusers": f"{folder}.{full}",
                "kohya": f"{kohya}{full.replace('.', '_')}",
                "comfyui": f"{comfyui}{full}",
            }[layout]
            halves = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
            tensors |= {f"{full}.{half}.weight": one for half, one in zip(halves, pair, strict=True)}
            tensors[f"{full}.alpha"] = np.array(ALPHA, np.float32)
    save_file(tensors, path)
    return made


def text_tensors(pipe) -> dict[str, np.ndarray]:
    """The text encoders' weights, by folder and transformers' names."""
    clips = dict(save_tree(pipe.clip, two_clip_tables({"first": (), "second": ()}).rules))
    folders = {"first": "text_encoder", "second": "text_encoder_2"}
    made = {f"{folders[key.split('.')[0]]}.{key.split('.', 1)[1]}": one for key, one in clips.items()}
    return made | {f"text_encoder_3.{key}": one for key, one in save_tree(whole(pipe.t5), t5_tables(()).rules)}


@pytest.mark.parametrize(
    "layout", ["kohya", *(pytest.param(one, marks=pytest.mark.slow) for one in ("diffusers", "comfyui"))]
)
def test_each_text_encoder_is_changed_by_its_own_factors(home, tmp_path, layout):
    made = text_lora(home, tmp_path / "x.safetensors", layout)
    before, after = (load_pipeline(home, lora=lora) for lora in ([], [f"{tmp_path / 'x.safetensors'}:{SCALE}"]))
    expected = {key: np.asarray(one, np.float64) for key, one in text_tensors(before).items()}
    for folder, modules in made.items():
        for name, (down, up) in modules.items():
            key = f"{folder}.{name.removeprefix('text_model.')}.weight"
            expected[key] = expected[key] + SCALE * ALPHA / RANK * product(down, up)
    found = text_tensors(after)
    assert found.keys() == expected.keys()
    # Six matrices of each of two layers of a CLIP and its projection, seven of T5's.
    assert sum(len(modules) for modules in made.values()) == 2 * (2 * 6 + 1) + 2 * 7
    for key, one in found.items():
        assert relative_error(one, expected[key]) <= 1e-6, key
    pairs = zip(jax.tree.leaves(before.transformer), jax.tree.leaves(after.transformer), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def style(home, tmp_path_factory):
    """A LoRA of every matrix of the transformer, by kohya's names."""
    model = Model("sd3.5-medium")
    shapes = source_shapes(SD3_RELEASE, model.abstract, model.labels)
    made = factors({key: shape for key, shape in shapes.items() if len(shape) in (2, 4)})
    return saved(tmp_path_factory.mktemp("lora") / "style.safetensors", made, "kohya")


def test_streamed_weights_have_the_bits_of_resident_ones(home, style):
    lora = [f"{style}:{SCALE}"]
    resident, streamed = (
        load_pipeline(home, dtype=jnp.bfloat16, lora=lora, weights=where) for where in ("device", "disk")
    )
    assert streamed.source == resident.source and streamed.base == resident.base != resident.source
    for part in ("transformer", "t5", "clip"):
        pairs = zip(*(jax.tree.leaves(whole(getattr(pipe, part))) for pipe in (streamed, resident)), strict=True)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.slow
def test_a_conversion_merges_what_a_load_merges(home, style, tmp_path):
    lora = [f"{style}:{SCALE}"]
    made, pipe = convert_model(home, tmp_path / "made", lora=lora), load_pipeline(home, lora=lora)
    again = load_pipeline(tmp_path / "made")
    assert [(one.name, one.scale) for one in made.loras] == [("style.safetensors", SCALE)]
    assert (again.base, again.loras) == (pipe.base, pipe.loras)
    pairs = zip(leaf_paths(again.transformer).values(), leaf_paths(pipe.transformer).values(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def lora_of(name: str, outer: int = 32, inner: int = 32) -> dict[str, np.ndarray]:
    """A LoRA of one matrix, by diffusers' names of factors."""
    pair = np.zeros((RANK, inner), np.float32), np.zeros((outer, RANK), np.float32)
    return {f"{name}.{half}.weight": one for half, one in zip(("lora_A", "lora_B"), pair, strict=True)}


WRONG = {
    "FLUX.1 by its modulations": (
        lora_of("transformer.transformer_blocks.0.norm1.linear", 18432, 3072),
        r"of another model, FLUX.1: it changes .*norm1.linear of shape \(18432, 3072\), but SD3.5-medium's is",
    ),
    "FLUX.1 or Chroma": (
        lora_of("transformer.single_transformer_blocks.0.proj_mlp"),
        "of another model, FLUX.1 or Chroma: none of its 1 modules can be found in SD3.5-medium",
    ),
    "FLUX.2": (lora_of("diffusion_model.double_stream_modulation_img.lin"), "of another model, FLUX.2: none of its 1"),
    "FLUX.1 or Chroma by its width": (
        lora_of("transformer.transformer_blocks.0.attn.to_q", 3072, 3072),
        r"of another model, FLUX.1 or Chroma: it changes .*to_q of shape \(3072, 3072\), but SD3.5-medium's is \(32, ",
    ),
    "SDXL": (
        lora_of("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        "of another model, Stable Diffusion 1, 2 or XL: none of its 1 modules",
    ),
    "SD3.5-large": (
        lora_of("transformer.transformer_blocks.2.attn.to_q", 2432, 2432),
        "of another model, SD3.5-large: it changes",
    ),
    "a second attention that a block has not": (
        lora_of("diffusion_model.joint_blocks.1.x_block.attn2.proj"),
        "of another model: none of its 1 modules can be found in SD3.5-medium, which has no",
    ),
    "a CLIP without its name": (
        lora_of("text_model.encoder.layers.0.mlp.fc1", 32, 16),
        "changes a CLIP .text_model.* without saying which of two; name its modules text_encoder. or lora_te1_",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_a_sentence_that_names_both_models(home, tmp_path, monkeypatch, name):
    tensors, told = WRONG[name]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr("difffract_jax.loading._load", lambda *names, **options: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=told) as caught:
        load_pipeline(home, lora=[tmp_path / "x.safetensors"])
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_changes_of_a_t5_that_is_not_there_are_refused(tmp_path):
    tiny_pipeline("sd3-medium", t5=False).save_pretrained(tmp_path / "diffusers")
    save_file(lora_of("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0", 32, 48), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="changes T5 .* but the model was saved without it; give the directory with"):
        load_pipeline(tmp_path / "diffusers", lora=[tmp_path / "x.safetensors"])
