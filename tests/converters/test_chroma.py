"""The table of Chroma's transformer: it covers the published sizes, and undoes itself."""

import numpy as np
import pytest

from chroma import PUBLISHED, TINY, tiny_transformer
from converters.chroma import CHROMA_DIFFUSERS, NUMBER, NumberedSource, chroma_config_from_diffusers
from converters.mapping import load_tree, save_tree, source_shapes
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
