"""Meshes and sharding rules: every parameter has exactly one rule, and eight devices hold what one holds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from difffract_jax import sharding
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from difffract_jax.models.chroma import ChromaConfig, ChromaMMDiT
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.flux2 import Flux2Config, Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.presets import preset_config
from difffract_jax.models.qwen3 import Qwen3Config, Qwen3Encoder
from difffract_jax.models.sd3 import Sd3Config, Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tiny import TINY
from difffract_jax.models.zimage import ZImageMMDiT
from difffract_jax.models.zimage_blocks import ZImageConfig
from difffract_jax.sharding import (
    EVERYWHERE,
    AxisRule,
    make_mesh,
    match,
    parse_mesh,
    partition_specs,
    pipeline_shardings,
    sharding_table,
    shardings,
    tilings,
)
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.tiles import full_index, spans

RULES = (AxisRule("blocks.{up,down}.kernel", ("layer", "d_model", "feat")), AxisRule("**.bias", None))
KERNEL, BIAS = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8), np.ones(5, np.float32)
TREE = {"blocks": {"up": {"kernel": KERNEL, "bias": BIAS}}}


def test_a_mesh_has_auto_axes_and_the_sizes_asked_for() -> None:
    mesh = make_mesh({"data": 2, "feature": 4})
    assert mesh.shape == {"data": 2, "site": 1, "feature": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"features": 2}, "`features` is not a mesh axis; did you mean `feature`?"),
        ({"data": 0}, "Mesh axis `data` must have a size of at least 1, but got 0."),
        ({"data": 3, "feature": 4}, "The mesh data 3 x feature 4 needs 12 devices, but only 8 are here."),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape: dict[str, int], told: str) -> None:
    with pytest.raises(UserError) as error:
        make_mesh(shape)
    assert told in str(error.value)


def test_a_mesh_is_read_from_text() -> None:
    assert parse_mesh("data=2, feature=4") == {"data": 2, "feature": 4}


@pytest.mark.parametrize("text", ["", "data", "data=x", "data=2,data=4", "data=2;feature=4"])
def test_text_that_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write each axis once with its size"):
        parse_mesh(text)


def test_rules_become_specs_and_an_axis_that_does_not_divide_stays_whole() -> None:
    specs = partition_specs(TREE, make_mesh({"feature": 8}), RULES)
    assert specs == {"blocks.up.bias": PartitionSpec(), "blocks.up.kernel": PartitionSpec(None, None, "feature")}
    assert partition_specs(TREE, make_mesh({"feature": 3}), RULES)["blocks.up.kernel"] == PartitionSpec(
        None, None, None
    )


def test_no_rule_or_two_rules_for_a_path_are_an_error() -> None:
    with pytest.raises(ValueError, match="blocks.up.scale must match exactly one sharding rule, but matches no rule"):
        match("blocks.up.scale", RULES)
    with pytest.raises(ValueError, match=r"matches blocks.\{up,down\}.kernel, \*\*"):
        match("blocks.up.kernel", (*RULES, AxisRule("**", None)))


def test_a_rule_of_the_wrong_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="has shape .5,., but its sharding rule names the axes"):
        partition_specs(TREE, make_mesh({}), (RULES[0], AxisRule("**.bias", ("layer", "feat"))))


def test_one_mesh_axis_never_splits_a_parameter_twice() -> None:
    with pytest.raises(ValueError, match="would be split twice over one mesh axis"):
        partition_specs({"w": jnp.ones((8, 8))}, make_mesh({"feature": 8}), (AxisRule("w", ("heads", "feat")),))


def test_placed_weights_equal_the_originals_and_are_spread() -> None:
    mesh = make_mesh({"feature": 8})
    placed = jax.device_put(TREE, shardings(TREE, mesh, RULES))
    for path, leaf in leaf_paths(placed).items():
        np.testing.assert_array_equal(leaf, leaf_paths(TREE)[path])
    assert placed["blocks"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 3, 1)


@pytest.mark.parametrize("shape", [{"feature": 8}, {"data": 2, "site": 2, "feature": 2}, {"site": 8}], ids=str)
def test_a_model_beside_a_training_is_split_over_the_whole_mesh(shape: dict[str, int]) -> None:
    mesh = make_mesh(shape)
    modules = {
        "transformer": nnx.eval_shape(lambda: MMDiT(TINY, rngs=nnx.Rngs(0))),
        "t5": nnx.eval_shape(
            lambda: T5Encoder(T5Config(vocab=32, d_model=16, d_kv=4, d_ff=32, layers=2, heads=4), rngs=nnx.Rngs(0))
        ),
    }
    for name, module in modules.items():
        places = leaf_paths(pipeline_shardings(mesh, EVERYWHERE)(name, module))
        for path, leaf in leaf_paths(module).items():
            if path.endswith("kernel") and path.startswith(("double", "single", "blocks")):
                assert np.prod(places[path].shard_shape(leaf.shape)) == leaf.size // 8, (path, leaf.shape)


def test_an_axis_that_two_mesh_axes_do_not_divide_is_split_by_one() -> None:
    tree = {"w": {"kernel": jnp.ones((6, 8))}}
    rules, placement = (AxisRule("w.kernel", ("d_model", "feat")),), {"d_model": ("data", "site"), "feat": "feature"}
    mesh = make_mesh({"data": 2, "site": 2, "feature": 2})
    assert partition_specs(tree, mesh, rules, placement) == {"w.kernel": PartitionSpec("data", "feature")}
    assert partition_specs(tree, make_mesh({"site": 2}), rules, placement) == {"w.kernel": PartitionSpec("site", None)}


def test_the_table_has_a_line_per_parameter() -> None:
    lines = sharding_table(TREE, make_mesh({"feature": 8}), RULES).splitlines()
    assert [line.split()[0] for line in lines] == list(leaf_paths(TREE))
    assert "layer d_model feat" in lines[1] and "'feature'" in lines[1]


def test_joining_a_multi_host_run_twice_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: calls.append((given, more)))
    sharding.initialize_distributed("host:1234", 2, 0, seconds=60)
    sharding.initialize_distributed("host:1234", 2, 0)
    assert calls == [(("host:1234", 2, 0), {"initialization_timeout": 60})]


SD3 = Sd3Config(
    depth_double=3,
    depth_dual=1,
    heads=2,
    head_dim=16,
    in_channels=16,
    out_channels=16,
    text_width=24,
    pooled_width=16,
    qk_norm=True,
    table=6,
)
FLUX2 = Flux2Config(
    depth_double=1,
    depth_single=1,
    heads=2,
    head_dim=16,
    rope_axes=(4, 4, 4, 4),
    in_channels=16,
    out_channels=16,
    text_width=32,
)
CHROMA = ChromaConfig(
    depth_double=1,
    depth_single=1,
    heads=2,
    head_dim=16,
    rope_axes=(4, 6, 6),
    in_channels=16,
    out_channels=16,
    text_width=32,
    modulator_inputs=16,
    modulator_width=20,
    modulator_layers=2,
)
ZIMAGE = ZImageConfig(
    depth=1,
    depth_refiner=1,
    heads=2,
    head_dim=16,
    rope_axes=(4, 6, 6),
    in_channels=16,
    out_channels=16,
    text_width=17,
)
TREES = {
    "t5": (
        sharding.T5,
        lambda: T5Encoder(
            T5Config(vocab=32, d_model=16, d_kv=4, d_ff=32, layers=2, heads=4, gated=True, activation="gelu_new"),
            rngs=nnx.Rngs(0),
        ),
    ),
    "qwen3": (  # beside T5, whose table it shares
        sharding.T5,
        lambda: Qwen3Encoder(
            Qwen3Config(
                vocab=32, width=16, d_ff=32, heads=4, key_heads=2, head_dim=8, padding_id=0, read_layers=(1, 2)
            ),
            rngs=nnx.Rngs(0),
        ),
    ),
    "flux": (sharding.MMDIT, lambda: MMDiT(replace(TINY, guidance=True), rngs=nnx.Rngs(0))),
    "flux2": (sharding.MMDIT, lambda: Flux2MMDiT(FLUX2, rngs=nnx.Rngs(0))),
    "chroma": (sharding.MMDIT, lambda: ChromaMMDiT(CHROMA, rngs=nnx.Rngs(0))),
    "zimage": (sharding.MMDIT, lambda: ZImageMMDiT(ZIMAGE, rngs=nnx.Rngs(0))),
    "sd3": (sharding.MMDIT, lambda: Sd3MMDiT(SD3, rngs=nnx.Rngs(0))),
    "clip": (
        sharding.CLIP,
        lambda: CLIPTextEncoder(
            CLIPConfig(vocab=32, d_model=8, d_ff=16, layers=2, heads=2, positions=8, activation="gelu", eos_token_id=2),
            rngs=nnx.Rngs(0),
        ),
    ),
    "autoencoder": (
        sharding.AUTOENCODER,
        lambda: Autoencoder(
            AutoencoderConfig(
                in_channels=3,
                latent_channels=4,
                widths=(8, 8),
                layers_per_block=1,
                norm_groups=4,
                scaling_factor=0.4,
                shift_factor=0.1,
                quant_conv=True,
                post_quant_conv=True,
                mid_attention=True,
            ),
            rngs=nnx.Rngs(0),
        ),
    ),
}


@pytest.mark.parametrize("kind", TREES)
def test_every_parameter_of_every_module_matches_exactly_one_rule(kind: str) -> None:
    rules, build = TREES[kind]
    tree = jax.eval_shape(build)
    mesh = make_mesh({"feature": 8})
    assert partition_specs(tree, mesh, rules).keys() == leaf_paths(tree).keys()


def test_no_rule_is_out_of_date() -> None:
    used: dict[str, set[AxisRule]] = {}
    for name, (_, build) in TREES.items():
        table = next(one for one, rules in sharding.PIPELINE.items() if rules is TREES[name][0])
        tree = jax.eval_shape(build)
        used.setdefault(table, set()).update(match(path, TREES[name][0]) for path in leaf_paths(tree))
    for table, rules in used.items():
        assert rules == set(sharding.PIPELINE[table]), "a rule that matches nothing is out of date"


@pytest.mark.parametrize(
    ("shape", "placement"),
    [
        ({"feature": 4}, sharding.PLACEMENT),
        ({"feature": 8}, sharding.PLACEMENT),
        ({"data": 8}, EVERYWHERE),
        ({"data": 2, "site": 2, "feature": 2}, EVERYWHERE),
        ({"site": 2, "feature": 4}, sharding.TRACED),
    ],
)
def test_in_tiles_the_shards_of_flux_are_no_more_than_their_own_bytes(shape: dict, placement: dict) -> None:
    mesh, config = make_mesh(shape), preset_config("flux-schnell")
    own = {True: 0, False: 0}
    read = {True: 0, False: 0}
    for module, kind in (("transformer", MMDiT), ("t5", T5Encoder)):
        tree = abstract_module(kind, getattr(config, module), jnp.bfloat16)
        rules = sharding.PIPELINE[module]
        leaves, cut = leaf_paths(tree), tilings(leaf_paths(tree), rules)
        for path, where in leaf_paths(shardings(tree, mesh, rules, placement)).items():
            leaf = leaves[path]
            index = full_index(where.devices_indices_map(leaf.shape)[mesh.devices.flat[-1]], leaf.shape)
            for tiled in (True, False):
                found = spans(leaf.shape, 2, cut.get(path) if tiled else None, index)
                read[tiled] += sum(end - begin for begin, end in found)
                own[tiled] += 2 * int(np.prod([each.stop - each.start for each in index]))
    assert read[True] <= 1.01 * own[True], "biases lie row by row"
    assert read[False] >= 1.5 * own[False], "so that tiles are needed"


def test_matrices_are_cut_by_their_rules_into_a_power_of_two_of_parts_that_are_not_small() -> None:
    rules = (
        *(AxisRule("up", ("layer", "d_model", "d_ff")), AxisRule("down", ("layer", "d_ff", "d_model"))),
        *(AxisRule("whole", None), AxisRule("bias", ("layer", "d_ff")), AxisRule("odd", ("inputs", "heads"))),
    )
    shapes = {"up": (2, 3072, 12288), "down": (2, 12288, 3072), "whole": (4096, 4096), "bias": (57, 2**20)}
    shapes |= {"odd": (2**16, 6 * 5), "unknown": (2**12, 2**12)}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    assert {name: tuple(cut) for name, cut in tilings(leaves, rules).items()} == {
        "up": (16, 16, True),
        "down": (16, 16, False),
        "odd": (1, 2, True),
    }
    small = {"up": jax.ShapeDtypeStruct((8, 512, 512), jnp.bfloat16)}
    assert {name: tuple(cut) for name, cut in tilings(small, rules).items()} == {"up": (2, 2, True)}
