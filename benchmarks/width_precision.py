"""What bfloat16 does to edges at FLUX's width: weights, transcoders and products rounded, against float32.

A model of FLUX's width (3,072, 24 heads) with few blocks and random weights is traced in float32; then with its weights
rounded to bfloat16, with the transcoders rounded, with bfloat16 products, and with all three. Per way, over the sources
that both graphs have: the largest difference of an edge into the target over the largest edge, and the median of the
relative differences of edges above a hundredth of the largest; and the conservation error.

    python benchmarks/width_precision.py [--double 2] [--single 1] [--features 4096]
"""

import argparse
import platform
import re

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.transcoder import random_transcoders

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--double", type=int, default=2, help="double-stream blocks")
PARSER.add_argument("--single", type=int, default=1, help="single-stream blocks")
PARSER.add_argument("--features", type=int, default=4096, help="of a transcoder")
PARSER.add_argument("--active", type=float, default=0.02, help="share of features that are active")
PROMPT = "a red circle"


def edges_of(graph):
    """Returns the edges into the target, by the source's kind, stream, block, position and feature."""
    target = int(graph.target_node[0])
    names = ("kind", "stream", "block", "position", "feature")
    columns = [getattr(graph, f"node_{name}") for name in names]
    into = np.flatnonzero(graph.edge_target == target)
    keys = zip(*(column[graph.edge_source[into]].tolist() for column in columns), strict=True)
    return dict(zip(keys, graph.edge_attribution[into].astype(np.float64).tolist(), strict=True))


def main() -> None:
    """Traces and compares."""
    options = PARSER.parse_args()
    config = FluxConfig(
        depth_double=options.double,
        depth_single=options.single,
        heads=24,
        head_dim=128,
        rope_axes=(16, 56, 56),
        in_channels=16,
        out_channels=16,
        text_width=64,
        pooled_width=32,
        guidance=False,
    )
    pipe = random_pipeline(transformer=config)
    tcs = random_transcoders(config, features=options.features, active=options.active)
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)  # noqa: E731
    half, rounded = pipe._replace(transformer=narrow(pipe.transformer)), tcs._replace(stacks=narrow(tcs.stacks))
    ways = {
        "float32": (pipe, tcs, "f32"),
        "bfloat16 weights": (half, tcs, "f32"),
        "bfloat16 transcoders": (pipe, rounded, "f32"),
        "bfloat16 products": (pipe, tcs, "bf16"),
        "all three": (half, rounded, "bf16"),
    }
    exact, target = None, None
    processor = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo", encoding="utf-8").read())  # noqa: SIM115
    print(f"{vars(options)}, {processor[1] if processor else platform.machine()}, jax {jax.__version__}")
    for name, (model, transcoders, precision) in ways.items():
        trace = capture(model, transcoders, PROMPT)
        target = target or strongest_feature(trace, transcoders, "img", options.double - 1)
        graph = attribute(
            trace, transcoders, target=target, max_nodes=1, min_attribution=0.0, target_batch=1, precision=precision
        )
        found = edges_of(graph)
        exact = exact or found
        both = [key for key in exact if key in found]
        ours, theirs = (np.array([edges[key] for key in both]) for edges in (found, exact))
        largest = np.max(np.abs(theirs))
        large = np.abs(theirs) > 0.01 * largest
        relative = np.median(np.abs(ours - theirs)[large] / np.abs(theirs)[large]) if large.any() else 0.0
        print(
            f"{name:<22} largest {np.max(np.abs(ours - theirs)) / largest:.1e}, median {relative:.1e} of "
            f"{int(large.sum())}; {len(both)} of {len(exact)} sources in both; conservation "
            f"{graph.largest_conservation_error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
