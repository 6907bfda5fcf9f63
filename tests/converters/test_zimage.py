"""The table of Z-Image's transformer: it covers the published sizes, and undoes itself."""

import numpy as np
import pytest
from zimage import PUBLISHED, TINY, tiny_transformer

from converters.mapping import load_tree, save_tree
from converters.source import Source
from converters.zimage import ZIMAGE_DIFFUSERS, zimage_config_from_diffusers, zimage_config_to_diffusers
from difffract_jax.config import UserError
from difffract_jax.models.presets import PRESETS
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.zimage import ZImageMMDiT
from model_kinds import KINDS, coverage


def test_every_tensor_makes_one_leaf_and_every_leaf_is_made():
    found = coverage(KINDS["z-image-turbo"])
    print(f"Z-Image-Turbo: {found.tensors} tensors, {found.numbers[0]:,} numbers")
    assert not found.problems and found.same and found.numbers[0] == found.numbers[1]
    assert zimage_config_from_diffusers(PUBLISHED) == PRESETS["z-image-turbo"]


def test_a_conversion_back_gives_the_same_tensors_and_sizes(tmp_path):
    theirs, config = tiny_transformer(), zimage_config_from_diffusers(TINY)
    theirs.save_pretrained(tmp_path)
    made = load_tree(Source(tmp_path), ZIMAGE_DIFFUSERS, abstract_module(ZImageMMDiT, config))
    back = dict(save_tree(made, ZIMAGE_DIFFUSERS))
    tensors = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    assert zimage_config_from_diffusers(zimage_config_to_diffusers(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes_dims": [4, 4, 4]}, "must add up to dim over n_heads"),
        ({"n_kv_heads": 1}, "n_kv_heads=1, but only as many as n_heads=2"),
        ({"siglip_feat_dim": 1152}, r"siglip_feat_dim=1152 \(supported: None\)"),
        ({"all_patch_size": [4]}, r"all_patch_size=\[4\]"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"t_scale": 1.0}, "t_scale=1.0"),
        ({"cfg_renorm": True}, "not understood: cfg_renorm"),
        ({"n_layers": None}, "missing: n_layers"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        zimage_config_from_diffusers(config)
