"""What a streamed trace needs on one accelerator: its programs, compiled from shapes for a TPU chip that is not here.

Blocks and transcoders come from the host one at a time. On the chip lie: two blocks (one runs, the next one comes), the
record, slim blocks, and of the decoders the rows that are active anywhere (`--rows`; all of them is the worst case).

    python benchmarks/streamed_plan.py --topology v5e:2x4 --pixels 512 --rows 49152

Needs libtpu. Every program is compiled for one chip of the topology; bytes are GiB = 2^30.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from difffract_jax.circuits.attribution.pullback import PullOptions, layout_of, lower_pull
from difffract_jax.circuits.frozen import streamed_sites
from difffract_jax.circuits.frozen.encoding import ReplacedSites, SiteLayers
from difffract_jax.circuits.frozen.replacement import Replacement, Sources
from difffract_jax.circuits.trace import sweep
from difffract_jax.circuits.trace.record import Blocks, record_step, take_weights
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.presets import PRESETS
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import sequences, slice_layer
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.plan import bytes_per_chip, compile_unkept, memory_of, open_topology
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--topology", default="v5e:2x4", help="TPU whose chip is meant")
PARSER.add_argument("--pixels", type=int, default=512, help="width and height")
PARSER.add_argument("--text-tokens", type=int, default=256, help="length of the text sequence")
PARSER.add_argument("--first", type=int, default=3, help="first double-stream block with transcoders")
PARSER.add_argument("--end", type=int, default=19, help="the block behind the last")
PARSER.add_argument("--features", type=int, default=49152, help="of a transcoder")
PARSER.add_argument("--rows", type=int, default=49152, help="decoder rows that are kept of each")
PARSER.add_argument("--active", type=int, default=256, help="places for features per position")
PARSER.add_argument("--targets", type=int, default=25, help="pulled back together")
GIB = 2**30


def replacement_of(model: Any, tcs: Any, options: argparse.Namespace, blocks: Blocks, inputs: tuple) -> Replacement:
    """Returns the shapes of what the pull-back of a streamed trace reads."""
    grid = (options.pixels // 16,) * 2
    weights = jax.eval_shape(partial(take_weights, blocks=blocks), model)
    record = jax.eval_shape(partial(record_step, grid=grid, blocks=blocks), model, weights, *inputs)
    slim = tuple(jax.eval_shape(lambda stack: stack.slim(), stack) for stack in weights.stacks)
    record = record._replace(weights=weights._replace(stacks=slim), unpooled=record.reading)
    chosen = jax.ShapeDtypeStruct((options.rows,), jnp.int32)
    kept = jax.eval_shape(streamed_sites._take, tcs, chosen)
    sites, values = [], []
    for x in record.mlp_in:
        layers, rows, _ = x.shape
        places = options.active if layers else 0
        index = _like(jnp.int32, layers, rows, places)
        stack = jax.tree.map(lambda leaf, n=layers: _like(leaf.dtype, n, *leaf.shape), kept) if layers else None
        sites.append(
            ReplacedSites(stack, SiteLayers(_like(jnp.int32, layers), _like(jnp.bool_, layers, rows), index, index))
        )
        values.append(_like(x.dtype, layers, rows, places))
    return Replacement(record, tuple(sites), Sources(record.boundary, tuple(values), record.mlp_out))


def main() -> None:
    """Compiles the programs and prints what they need."""
    options = PARSER.parse_args()
    topology = open_topology(options.topology)
    where = NamedSharding(make_mesh({"data": 1}, topology.devices[:1]), PartitionSpec())
    place = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
    config, text = PRESETS["flux-schnell"], options.text_tokens
    model = abstract_module(MMDiT, config, jnp.bfloat16)
    shape = TranscoderConfig(
        d_model=config.d_model, features=options.features, time_embed=256, conditioning="film_raw_t"
    )
    tcs = place(abstract_module(Transcoder, shape, jnp.bfloat16))
    rows, wide = (options.pixels // 16) ** 2, lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    given = Inputs(wide(rows, config.in_channels), wide(text, config.text_width), wide(config.pooled_width), wide())
    inputs = given, jax.ShapeDtypeStruct((text,), jnp.bool_)
    replacement = place(replacement_of(model, tcs, options, Blocks(options.first, options.end, False), inputs))
    record, sites, sources = replacement
    block, pair = place(slice_shapes(model.double)), (sequences(record.boundary, model.double.groups),) * 2
    row = place(wide(rows, config.d_model))
    live, code = place(jax.ShapeDtypeStruct((rows,), jnp.bool_)), place(wide(rows, options.features))
    held = {
        "a block": bytes_per_chip(block),
        "a transcoder": bytes_per_chip(tcs),
        "slim blocks": bytes_per_chip(record.weights.stacks),
        "record": bytes_per_chip(record) - bytes_per_chip(record.weights.stacks),
        "codes": bytes_per_chip((sources.values, [one.layers for one in sites])),
        "decoder rows": bytes_per_chip([one.stack for one in sites]),
    }
    for name, size in held.items():
        print(f"{name:<24} {size / GIB:6.2f}")
    recorded = held["record"] + held["slim blocks"]
    encoded = recorded + held["codes"] + held["decoder rows"]
    active = place(jax.ShapeDtypeStruct((options.rows,), jnp.int32))
    programs = {
        "record a block": (
            lambda: sweep._record_pair.lower(block, pair, (record.cond,) * 2),
            recorded + held["a block"],
        ),
        "encode a site": (
            lambda: streamed_sites._encode.lower(tcs, row, live, record.t),
            encoded + held["a transcoder"],
        ),
        "split a site": (
            lambda: streamed_sites._split.lower(tcs, code, row, row, live, options.active),
            encoded + held["a transcoder"] + bytes_per_chip(code),
        ),
        "take decoder rows": (lambda: streamed_sites._take.lower(tcs, active), encoded + held["a transcoder"]),
        f"pull back {options.targets}": (
            lambda: lower_pull(replacement, options.targets, "tpu", False, PullOptions()),
            encoded + layout_of(replacement).size * options.targets * 4,
        ),
    }
    for name, (lower, held_besides) in programs.items():
        with jax.default_matmul_precision("highest"):
            memory = memory_of(compile_unkept(lower()))
        needed = held_besides + memory["peak"] - memory["arguments"]
        fits = "fits" if needed <= topology.hbm else "does NOT fit"
        print(f"{name:<24} {needed / GIB:6.2f} of {topology.hbm / GIB:.2f}: {fits}", flush=True)


def _like(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def slice_shapes(stack: Any) -> Any:
    """Returns the shapes of one layer of a stack."""
    return jax.eval_shape(partial(slice_layer, layer=0), stack)


if __name__ == "__main__":
    main()
