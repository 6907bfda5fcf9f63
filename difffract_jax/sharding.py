"""Where weights live: the one mesh constructor, and sharding rules as data.

1. A mesh has named axes: `data` (examples, targets), `site` (transcoders) and `feature` (a transcoder's features, a
   model's heads and MLP columns). `make_mesh` is the only place that builds one.
2. Every parameter path has exactly one `AxisRule`, which names its axes in the words of `axes.py`: pattern -> axes.
3. `PLACEMENT` says which logical axes lie across which mesh axis; every other axis is whole on each device.
4. `shardings` puts 2 and 3 together for one tree of weights: path -> `NamedSharding`. `sharding_table` prints it.
5. `tilings` cuts matrices along the axes that a mesh may split, so that in a bucket each shard lies in few pieces.
6. Where a model is evaluated once, to generate or to trace, `site` and `feature` split its layers together
   (`traced_pipeline`, `traced_transcoders`), since layers come one after the other.

Symbols: in a pattern `*` stands for one part of a path, `**` for any number of parts, `{a,b}` for a or b; a path is
`checkpoint.leaf_paths`' key, as in `double.img.attn.qkv.kernel`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from difffract_jax.config import UserError, nearest
from difffract_jax.spread import MODEL_AXES, spread_over, ways_of
from difffract_jax.storage.checkpoint import ShardingsOf, leaf_paths
from difffract_jax.storage.compile_cache import compile_cpu_meshes_anew
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.storage.tiles import Tiling

MESH_AXES = ("data", "site", "feature")
AnyMesh = Mesh | AbstractMesh
"""Devices, or their number alone, which suffices to say what part of an array each would hold."""
Placement = Mapping[str, str | tuple[str, ...]]
"""Logical axis -> the mesh axis, or axes, that split it."""


class AxisRule(NamedTuple):
    """The logical axes of every parameter whose path matches a pattern.

    Attributes:
        pattern: path pattern, see the module docstring.
        axes: one name per axis of the array, or `WHOLE` for parameters that are never split.
    """

    pattern: str
    axes: tuple[str, ...] | None


WHOLE: tuple[str, ...] | None = None
"""Axes of a parameter that every device holds in full."""

MMDIT = (
    AxisRule("{img_in,txt_in}.kernel", ("inputs", "d_model")),
    AxisRule("{time_in,vector_in,guidance_in}.up.kernel", ("inputs", "d_ff")),
    AxisRule("{time_in,vector_in,guidance_in}.down.kernel", ("d_ff", "d_model")),
    AxisRule("{time_in,vector_in,guidance_in}.up.bias", ("d_ff",)),
    AxisRule("{time_in,vector_in,guidance_in}.down.bias", ("d_model",)),
    AxisRule("{img_in,txt_in}.bias", ("d_model",)),
    AxisRule("{txt_norm.scale,img_pad,txt_pad}", WHOLE),
    AxisRule("modulator.{inputs,outputs}.kernel", ("inputs", "outputs")),
    AxisRule("modulator.{inputs,outputs}.bias", ("outputs",)),
    AxisRule("modulator.layers.norm.scale", ("layer", "inputs")),
    AxisRule("modulator.layers.up.kernel", ("layer", "inputs", "d_ff")),
    AxisRule("modulator.layers.up.bias", ("layer", "d_ff")),
    AxisRule("modulator.layers.down.kernel", ("layer", "d_ff", "outputs")),
    AxisRule("modulator.layers.down.bias", ("layer", "outputs")),
    AxisRule("{double,single}.number", ("layer", "inputs")),
    AxisRule("shared.*.kernel", ("d_model", "modulation")),
    AxisRule("{dual,double,last}.*.mod.kernel", ("layer", "d_model", "modulation")),
    AxisRule("{dual,double,last}.*.mod.bias", ("layer", "modulation")),
    AxisRule("{dual,double,last}.*.{attn,attn2}.qkv.kernel", ("layer", "d_model", "heads")),
    AxisRule("{dual,double,last}.*.{attn,attn2}.qkv.bias", ("layer", "heads")),
    AxisRule("{dual,double,last}.*.{attn,attn2}.{q_norm,k_norm}.scale", ("layer", "head_dim")),
    AxisRule("{dual,double,last}.*.{attn,attn2}.proj.kernel", ("layer", "heads", "d_model")),
    AxisRule("{dual,double,last}.*.mlp.{gate,up}.kernel", ("layer", "d_model", "d_ff")),
    AxisRule("{dual,double,last}.*.mlp.up.bias", ("layer", "d_ff")),
    AxisRule("{dual,double,last}.*.mlp.down.kernel", ("layer", "d_ff", "d_model")),
    AxisRule("{dual,double,last}.*.{attn.proj,attn2.proj,mlp.down}.bias", ("layer", "d_model")),
    AxisRule("positions", WHOLE),
    AxisRule("{refine_img,refine_txt,trunk,single}.mod.kernel", ("layer", "d_model", "modulation")),
    AxisRule("{refine_img,refine_txt,trunk,single}.mod.bias", ("layer", "modulation")),
    AxisRule("{refine_img,refine_txt,trunk,single}.qkv.kernel", ("layer", "d_model", "heads")),
    AxisRule("single.qkv.bias", ("layer", "heads")),
    AxisRule("{refine_img,refine_txt,trunk,single}.{q_norm,k_norm}.scale", ("layer", "head_dim")),
    AxisRule("single.{gate,up}.kernel", ("layer", "d_model", "d_ff")),
    AxisRule("single.up.bias", ("layer", "d_ff")),
    AxisRule("{refine_img,refine_txt,trunk,single}.attn_out.kernel", ("layer", "heads", "d_model")),
    AxisRule("{refine_img,refine_txt,trunk}.mlp.{gate,up}.kernel", ("layer", "d_model", "d_ff")),
    AxisRule("{refine_img,refine_txt,trunk}.mlp.down.kernel", ("layer", "d_ff", "d_model")),
    AxisRule("{refine_img,refine_txt,trunk}.{before_attn,behind_attn,before_mlp,behind_mlp}.scale", WHOLE),
    AxisRule("single.mlp_out.kernel", ("layer", "d_ff", "d_model")),
    AxisRule("single.mlp_out.bias", ("layer", "d_model")),
    AxisRule("final.mod.kernel", ("d_model", "modulation")),
    AxisRule("final.mod.bias", ("modulation",)),
    AxisRule("final.proj.kernel", ("d_model", "outputs")),
    AxisRule("final.proj.bias", ("outputs",)),
)
"""Axes of the MM-DiT, of every model. `heads` includes head_dim and, before attention, q, k and v."""

TRANSCODER = (
    AxisRule("{time_in,time_out}.kernel", ("layer", "time_embed", "time_embed_out")),
    AxisRule("{time_in,time_out}.bias", ("layer", "time_embed")),
    AxisRule("film.kernel", ("layer", "time_embed", "modulation")),
    AxisRule("film.bias", ("layer", "modulation")),
    AxisRule("enc.kernel", ("layer", "d_model", "feat")),
    AxisRule("{enc.bias,threshold}", ("layer", "feat")),
    AxisRule("dec.kernel", ("layer", "feat", "d_model")),
    AxisRule("dec.bias", ("layer", "d_model")),
    AxisRule("skip.kernel", ("layer", "d_model", "d_model_out")),
)
"""Axes of one stream's stacked transcoders."""

T5 = (
    AxisRule("embed.embedding", ("vocab", "t5_width")),
    AxisRule("relative_bias.embedding", ("buckets", "head")),
    AxisRule("blocks.{attn_norm,ff_norm}.scale", ("layer", "t5_width")),
    AxisRule("blocks.attn.{q,k,v}.kernel", ("layer", "t5_width", "heads")),
    AxisRule("blocks.attn.{q_norm,k_norm}.scale", ("layer", "head_dim")),
    AxisRule("blocks.attn.o.kernel", ("layer", "heads", "t5_width")),
    AxisRule("blocks.ff.{gate,up}.kernel", ("layer", "t5_width", "d_ff")),
    AxisRule("blocks.ff.down.kernel", ("layer", "d_ff", "t5_width")),
    AxisRule("final_norm.scale", ("t5_width",)),
)
"""Axes of the T5 encoder, 4.8 billion parameters in FLUX.1, and of Qwen3, 3.1 billion in FLUX.2-klein."""

CLIP = (AxisRule("**", WHOLE),)
"""The CLIP text encoder has 0.1 billion parameters: not worth a communication."""

AUTOENCODER = (AxisRule("**", WHOLE),)
"""The autoencoder has 0.1 billion parameters, most of them in small convolutions."""

PIPELINE = {"transformer": MMDIT, "t5": T5, "clip": CLIP, "vae": AUTOENCODER}
"""The rules of each module of a pipeline."""

PLACEMENT: Placement = {"heads": "feature", "d_ff": "feature", "feat": "feature", "modulation": "feature"}
"""Which logical axes are split, and across which mesh axis."""
EVERYWHERE: Placement = {
    **PLACEMENT,
    "vocab": "feature",
    **dict.fromkeys(("d_model", "t5_width"), ("data", "site")),
}
"""The same for a model that lies beside something larger: every matrix is split over the whole mesh, and a block's are
gathered over `data` and `site` while it runs, where examples are spread."""
TRACED: Placement = dict.fromkeys((*PLACEMENT, "vocab"), MODEL_AXES)
"""The same where a model is evaluated once: T5's table of tokens too, a quarter of a GiB."""
TRACED_DECODER: Placement = {"d_model": MODEL_AXES}
"""The same of decoder vectors: positions pick some of them, which every device then has its channels of."""


TILE, MOST_TILES = 2**17, 16
"""Bytes of a tile at least, and parts of an axis at most: shards of finer meshes read more than their own bytes."""


def tilings(leaves: Mapping[str, Any], rules: Sequence[AxisRule]) -> dict[str, Tiling]:
    """Returns how the matrices of a tree are cut in a bucket: along the axes that a mesh may split, by its rules.

    Both axes have a power of two of parts, that which `feature` splits no fewer than that which `data` and `site` may,
    where they can. Parameters that no single rule speaks of, and small matrices, are not cut.

    Args:
        leaves: path -> array, or what has its shape and type.
        rules: of that kind of tree, such as `MMDIT`.
    """
    made = {}
    for path, leaf in leaves.items():
        found = [rule.axes for rule in rules if _regex(rule.pattern).fullmatch(path)]
        if len(leaf.shape) < 2 or len(found) != 1 or found[0] is None or found[0][-2] == "layer":
            continue
        sizes, names = leaf.shape[-2:], found[0][-2:]
        room = prod(sizes) * np.dtype(leaf.dtype).itemsize // TILE
        parts, inner = [1, 1], [EVERYWHERE.get(name) == "feature" for name in names]
        for axis in sorted((0, 1), key=lambda axis: not inner[axis]) * MOST_TILES.bit_length():
            more = 2 * parts[axis]
            if names[axis] in EVERYWHERE and more <= MOST_TILES and 2 * prod(parts) <= room and not sizes[axis] % more:
                parts[axis] = more
        if prod(parts) > 1:
            made[path] = Tiling(*parts, by_column=inner[1] or not inner[0])
    return made


def tilings_at(
    out: str | Path, parts: Mapping[str, Mapping[str, Any]], rules: Mapping[str, Sequence[AxisRule]]
) -> dict[str, dict[str, Tiling]]:
    """Returns how the weights of a directory are cut, see `tilings`: not at all but in a bucket.

    Args:
        out: the directory.
        parts: name of a part -> path -> array, or what has its shape and type.
        rules: of each part; those without are not cut.
    """
    if not is_remote(out):
        return {}
    return {name: tilings(leaves, rules[name]) for name, leaves in parts.items() if name in rules}


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of the given axis sizes over the first devices.

    Axes are of type Auto: an explicit axis refuses an ordinary matrix product that contracts over it.

    Args:
        shape: size of each axis, `{"data": 2, "feature": 4}`; axes left out have size 1.
        devices: devices to use, all of this process's backend when left out.
    """
    for name, size in shape.items():
        if name not in MESH_AXES:
            raise UserError(f"`{name}` is not a mesh axis{nearest(name, MESH_AXES)}")
        if size < 1:
            raise UserError(f"Mesh axis `{name}` must have a size of at least 1, but got {size}.")
    sizes = tuple(shape.get(name, 1) for name in MESH_AXES)
    found = list(jax.devices() if devices is None else devices)
    if prod(sizes) > len(found):
        wanted = " x ".join(f"{name} {size}" for name, size in shape.items())
        raise UserError(f"The mesh {wanted} needs {prod(sizes)} devices, but only {len(found)} are here.")
    types, used = (AxisType.Auto,) * len(MESH_AXES), found[: prod(sizes)]
    if len(used) > 1 and used[0].platform == "cpu":
        compile_cpu_meshes_anew()
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=used)
    except RuntimeError:
        # On a torus of TPUs such as 4x4x4, an axis of size 2 or 8 fits only if it may take a part of a physical axis.
        split = mesh_utils.create_device_mesh(sizes, used, allow_split_physical_axes=True)
        return Mesh(split, MESH_AXES, axis_types=types)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data=2,feature=4` as axis sizes."""
    shape: dict[str, int] = {}
    for item in text.split(","):
        name, separator, size = item.strip().partition("=")
        if not separator or not size.isdecimal() or name in shape:
            raise UserError(f"`{text}` is not a mesh; write each axis once with its size, as in data=2,feature=4.")
        shape[name] = int(size)
    return shape


def shardings(tree: Any, mesh: AnyMesh, rules: Sequence[AxisRule], placement: Placement = PLACEMENT) -> Any:
    """Returns a tree like `tree` whose leaves are the `NamedSharding`s of its arrays.

    Args:
        tree: weights, or their shapes from `jax.eval_shape`.
        mesh: mesh to place them on.
        rules: the axis rules of that kind of tree, such as `MMDIT`.
        placement: logical axis -> mesh axis.
    """
    specs = partition_specs(tree, mesh, rules, placement)
    leaves = [NamedSharding(mesh, spec) for spec in specs.values()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def pipeline_shardings(mesh: AnyMesh, placement: Placement = PLACEMENT) -> Callable[[str, Any], Any]:
    """Returns the function (module of a pipeline, its abstract tree) -> tree of shardings."""
    return lambda module, tree: shardings(tree, mesh, PIPELINE[module], placement)


def traced_pipeline(mesh: Mesh) -> Callable[[str, Any], Any]:
    """Returns what `pipeline_shardings` does, for a model that is evaluated once: to generate, or to trace.

    Args:
        mesh: whose axes `site` and `feature` split the model's layers together.

    Raises:
        UserError: by the function, for a transformer that these axes do not divide.
    """

    def placed(module: str, tree: Any) -> Any:
        found = shardings(tree, mesh, PIPELINE[module], TRACED)
        if module == "transformer" and ways_of(mesh) > 1:
            _refuse_undivided(tree.config, found, mesh)
        return found

    return placed


def traced_transcoders(mesh: Mesh) -> ShardingsOf:
    """Returns where the transcoders of a group of sites live in a trace."""

    def placed(stack: Any) -> Any:
        encoding, decoding = (partition_specs(stack, mesh, TRANSCODER, way) for way in (TRACED, TRACED_DECODER))
        specs = encoding | {"dec.kernel": decoding["dec.kernel"]}
        return jax.tree.unflatten(jax.tree.structure(stack), [NamedSharding(mesh, spec) for spec in specs.values()])

    return ShardingsOf(placed)


def traced_stack(name: str, stack: Any, mesh: Mesh) -> Any:
    """Returns where the blocks of a stack live in a trace; those of a kind without rules are split by last axis.

    Args:
        name: of the stack, as in `double`.
        stack: its weights, or their shapes.
        mesh: to place them on.
    """
    leaves = []
    for path, leaf in leaf_paths(stack).items():
        rules = [rule for rule in MMDIT if _regex(rule.pattern).fullmatch(f"{name}.{path}")]
        last = leaf.ndim > 1 and leaf.shape[-1] % ways_of(mesh) == 0
        by_last = spread_over(leaf.ndim, leaf.ndim - 1) if last else PartitionSpec()
        spec = _partition_spec(path, leaf.shape, rules[0].axes, mesh, TRACED) if rules else by_last
        leaves.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(jax.tree.structure(stack), leaves)


def _refuse_undivided(config: Any, found: Any, mesh: Mesh) -> None:
    """Refuses a mesh whose model axes split none of a transformer's heads or MLP columns."""
    if any(not place.is_fully_replicated for place in jax.tree.leaves(found)):
        return
    sizes = ", ".join(str(n) for n in range(2, config.heads + 1) if config.heads % n == 0 and config.d_ff % n == 0)
    raise UserError(
        f"The mesh splits the model {ways_of(mesh)} ways (site x feature), which divides neither its {config.heads} "
        f"heads nor its {config.d_ff} MLP columns; make that {sizes or 1}, and use other devices along data."
    )


def partition_specs(
    tree: Any, mesh: AnyMesh, rules: Sequence[AxisRule], placement: Placement = PLACEMENT
) -> dict[str, PartitionSpec]:
    """Returns the `PartitionSpec` of every path of `tree`, in the tree's order."""
    return {
        path: _partition_spec(path, leaf.shape, match(path, rules).axes, mesh, placement)
        for path, leaf in leaf_paths(tree).items()
    }


def match(path: str, rules: Sequence[AxisRule]) -> AxisRule:
    """Returns the one rule whose pattern matches `path`; none or several are an error in the rules."""
    found = [rule for rule in rules if _regex(rule.pattern).fullmatch(path)]
    if len(found) != 1:
        names = ", ".join(rule.pattern for rule in found) or "no rule"
        raise ValueError(f"Parameter {path} must match exactly one sharding rule, but matches {names}.")
    return found[0]


def sharding_table(tree: Any, mesh: Mesh, rules: Sequence[AxisRule], placement: Placement = PLACEMENT) -> str:
    """Returns one line per parameter: path, shape, logical axes, mesh axes."""
    specs = partition_specs(tree, mesh, rules, placement)
    lines = []
    for path, leaf in leaf_paths(tree).items():
        axes = match(path, rules).axes
        lines.append(f"{path:<36} {leaf.shape!s:<22} {'whole' if axes is None else ' '.join(axes):<32} {specs[path]}")
    return "\n".join(lines)


def initialize_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: int = 300,
) -> None:
    """Joins this process to a multi-host run; does nothing when it has joined already.

    Args:
        coordinator: address `host:port` of the first process; found by JAX itself on TPU pods and under Slurm.
        processes: how many processes take part.
        process_id: this process's number, from 0.
        seconds: how long it waits for the others.
    """
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, processes, process_id, initialization_timeout=seconds)


def _partition_spec(
    path: str, shape: tuple[int, ...], axes: tuple[str, ...] | None, mesh: AnyMesh, placement: Placement
) -> PartitionSpec:
    if axes is None:
        return PartitionSpec()
    if len(axes) != len(shape):
        raise ValueError(f"Parameter {path} has shape {shape}, but its sharding rule names the axes {axes}.")
    entries = [_mesh_axis(axis, size, mesh, placement) for axis, size in zip(axes, shape, strict=True)]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"Parameter {path} would be split twice over one mesh axis: {axes} -> {entries}.")
    return PartitionSpec(*entries)


def _mesh_axis(axis: str, size: int, mesh: AnyMesh, placement: Placement) -> str | tuple[str, ...] | None:
    """Returns what splits `axis`, or None: an axis that does not divide evenly stays whole, or is split less."""
    names = placement.get(axis, ())
    split = [name for name in ((names,) if isinstance(names, str) else names) if mesh.shape[name] > 1]
    while split and size % prod(mesh.shape[name] for name in split):
        split.pop()
    return (split[0] if len(split) == 1 else tuple(split)) if split else None


def _regex(pattern: str) -> re.Pattern[str]:
    """Translates a path pattern; `re.escape` leaves nothing special but what is put back here."""
    text = re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")
    text = text.replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    return re.compile(text)
