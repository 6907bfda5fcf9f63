"""The table of Chroma's transformer: it covers the published sizes, and undoes itself."""

import numpy as np
import pytest
import torch

from chroma import PUBLISHED, TINY, their_transformer, tiny_transformer
from converters.chroma import CHROMA_DIFFUSERS, NUMBER, NumberedSource, chroma_config_from_diffusers
from converters.mapping import check_coverage, load_tree, save_tree, source_shapes
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaMMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.storage.checkpoint import leaf_paths

SIZES = (1023, 8_899_983_424)
"""Tensors and numbers of Chroma1-HD."""


def test_every_tensor_makes_one_leaf_and_every_leaf_is_made():
    with torch.device("meta"):
        module = their_transformer(PUBLISHED)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    config = chroma_config_from_diffusers(PUBLISHED)
    abstract = abstract_module(ChromaMMDiT, config)
    wanted = source_shapes(CHROMA_DIFFUSERS, abstract)
    numbers = {key: shape for key, shape in wanted.items() if key.endswith(NUMBER)}
    assert {key: shape for key, shape in wanted.items() if key not in numbers} == shapes
    assert len(numbers) == config.layout.depth == 57 and set(numbers.values()) == {(1,)}
    assert check_coverage(shapes | numbers, CHROMA_DIFFUSERS, abstract) == []
    count = sum(int(np.prod(leaf.shape)) for leaf in leaf_paths(abstract).values()) - len(numbers)
    print(f"Chroma1-HD: {len(shapes)} tensors, {count:,} numbers")
    assert count == sum(int(np.prod(shape)) for shape in shapes.values())
    assert (len(shapes), count) == SIZES


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
