"""The tables of Chroma's transformer: they cover the published sizes, undo themselves, and are diffusers'."""

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from chroma import PUBLISHED, TINY, tiny_transformer
from converters.chroma import (
    CHROMA_DIFFUSERS,
    CHROMA_OF_DIFFUSERS,
    CHROMA_ORIGINAL,
    CHROMA_RELEASE,
    NUMBER,
    NumberedSource,
    chroma_config_from_diffusers,
    chroma_config_from_shapes,
)
from converters.mapping import ArraySource, check_coverage, load_tree, save_tree, source_shapes
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaMMDiT
from difffract_jax.models.shapes import abstract_module
from model_kinds import KINDS, Coverage, coverage

SIZES = (1023, 8_899_983_424)
"""Tensors and numbers of Chroma1-HD."""


def test_every_tensor_makes_one_leaf_and_every_leaf_is_made():
    found = coverage(KINDS["chroma1-hd"])
    print(f"Chroma1-HD: {found.tensors} tensors, {found.numbers[0]:,} numbers")
    assert found == Coverage([], True, SIZES[0], (SIZES[1], SIZES[1]))


def test_every_block_has_its_number():
    config = chroma_config_from_diffusers(PUBLISHED)
    wanted = source_shapes(CHROMA_DIFFUSERS, abstract_module(ChromaMMDiT, config))
    numbers = {key: shape for key, shape in wanted.items() if key.endswith(NUMBER)}
    assert len(numbers) == config.layout.depth == 57 and set(numbers.values()) == {(1,)}


def test_a_conversion_back_gives_the_same_tensors(tmp_path):
    theirs, config = tiny_transformer(), chroma_config_from_diffusers(TINY)
    theirs.save_pretrained(tmp_path)
    source = NumberedSource(Source(tmp_path), config)
    made = load_tree(source, CHROMA_DIFFUSERS, abstract_module(ChromaMMDiT, config))
    assert np.array_equal(made.single.number[...], [[0], [1]])
    back = dict(save_tree(made, CHROMA_DIFFUSERS))
    tensors = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert {key for key in back if not key.endswith(NUMBER)} == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


class _OfAnyWidth:
    """PyTorch for diffusers' converter, which has the release's width written out where it splits a fused matrix."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def split(tensor, sizes, dim):
        return torch.split(tensor, [size * tensor.shape[dim] // sum(sizes) for size in sizes], dim)


def test_the_original_release_is_what_diffusers_reads_of_it(monkeypatch):
    monkeypatch.setattr(single_file_utils, "torch", _OfAnyWidth())
    tensors = {key: tensor.numpy() for key, tensor in tiny_transformer().state_dict().items()}
    config = chroma_config_from_diffusers(TINY)
    numbers = {
        f"{blocks}.{i}{NUMBER}": np.array([i], np.float32) for blocks in CHROMA_OF_DIFFUSERS.blocks for i in (0, 1)
    }
    model = load_tree(ArraySource("tiny", tensors | numbers), CHROMA_DIFFUSERS, abstract_module(ChromaMMDiT, config))
    made = {key: value for key, value in save_tree(model, CHROMA_ORIGINAL) if not key.endswith(NUMBER)}
    given = {key: torch.tensor(np.ascontiguousarray(value)) for key, value in made.items()}
    theirs = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers(given)
    assert not given and theirs.keys() == tensors.keys()
    assert all(np.array_equal(theirs[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("layout", [CHROMA_RELEASE, CHROMA_OF_DIFFUSERS], ids=["original", "diffusers"])
@pytest.mark.parametrize("sizes", [PUBLISHED, TINY], ids=["published", "tiny"])
def test_sizes_are_read_off_a_single_file_whose_every_tensor_is_used(layout, sizes):
    config = chroma_config_from_diffusers(sizes)
    shapes = source_shapes(layout.rules, abstract_module(ChromaMMDiT, config))
    stored = {key: shape for key, shape in shapes.items() if not key.endswith(NUMBER)}
    assert chroma_config_from_shapes(stored, config.rope_axes) == config
    assert check_coverage(shapes, layout.rules, abstract_module(ChromaMMDiT, config)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"txt_in.weight": None}, r"not a Chroma transformer: it lacks txt_in.weight \(text width\)"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (20,)}, "heads of 20 dimensions, which the axes"),
        ({"distilled_guidance_layer.in_proj.weight": (20, 12)}, "a modulator of 12 channels, which must be a multiple"),
    ],
)
def test_a_single_file_that_tells_no_sizes_is_refused(change, message):
    shapes = source_shapes(CHROMA_ORIGINAL, abstract_module(ChromaMMDiT, chroma_config_from_diffusers(TINY)))
    given = {key: shape for key, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(UserError, match=message) as error:
        chroma_config_from_shapes(given, tuple(TINY["axes_dims_rope"]))
    assert str(error.value).count(". ") == 0


def test_what_the_releases_file_says_of_flux_alone_changes_nothing():
    """Its config.json names two things that the class ignores: huggingface/diffusers issue 12112."""
    said = {"guidance_embeds": False, "pooled_projection_dim": 768}
    assert chroma_config_from_diffusers(PUBLISHED | said) == chroma_config_from_diffusers(PUBLISHED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximator_num_channels": 12}, "approximator_num_channels=12, which must be a multiple of 8"),
        ({"guidance_embeds": True}, r"guidance_embeds=True \(supported: False\)"),
        ({"axes_dims_rope": (4, 4, 4)}, "which must add up to attention_head_dim=16"),
        ({"patch_size": 2}, r"patch_size=2 \(supported: 1\)"),
        ({"num_layers": None}, "missing: num_layers"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        chroma_config_from_diffusers(config)
