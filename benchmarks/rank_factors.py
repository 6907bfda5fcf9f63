"""Whether the first hop below a target pays as factors: exact, and how much of an expanded node it would save.

A target enters at one row. In a double-stream block its gradient passes that block's attention at once, so what enters
the block has rank 1 + heads: a vector of weights over rows, times a vector over columns, for the row itself and for
each head. The next hop, through a whole block, can then be taken on the factors, and written out densely after it: a
fraction of the products of a dense hop. After two such hops the rank is no longer small.

1. Both ways of taking the hop are computed on a recorded double-stream block of the middle size of `attribution.py`,
   for `--targets` random targets, and must agree.
2. Both are timed on one thread in processor time, in turn, `--repeats` times; medians.
3. The middle size is traced as `attribution.py` does. What could be saved per expanded node is the difference of the
   two ways, times the share of nodes that have a whole block below them, of its seconds per node.
4. For FLUX.1's shape the same is counted in multiplications.

    python benchmarks/rank_factors.py [--targets 10] [--repeats 9]
"""

import argparse
import os
import statistics
import time

if __name__ == "__main__":
    # One core, and one thread in XLA's pool: both must be set before JAX starts.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import attribution
import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.frozen.replacement import prepare_step
from difffract_jax.models.blocks import split_heads
from difffract_jax.models.stacks import slice_layer
from difffract_jax.ops import attention_pattern

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--targets", type=int, default=10, help="targets that take the hop together")
PARSER.add_argument("--repeats", type=int, default=9, help="runs whose median is taken")


def dense_hop(block, frozen, cond, leaving):
    """Pulls cotangents of the streams leaving a block, [target rows d_model] each, back through it, one by one."""

    def forward(h):
        return tuple(block(h, cond, frozen=frozen, mlp=lambda _, x: jnp.zeros_like(x))[0])

    _, pull = jax.vjp(forward, tuple(jnp.zeros(rows.shape[1:], rows.dtype) for rows in leaving))
    return jax.lax.map(lambda one: pull(one)[0], leaving)


def hop_on_factors(block, frozen, cond, over_rows, over_columns):
    """Returns what `dense_hop` does, for cotangents given as factors.

    Args:
        block: a double-stream block.
        frozen: its record.
        cond: of the evaluation.
        over_rows: weights, [target rows rank], per stream, image first.
        over_columns: vectors, [target rank d_model], per stream.
    """
    heads, head_dim = frozen.q.shape[1:]
    text, streams, mods = frozen.inv_std1.txt.shape[0], (block.img, block.txt), frozen.mod
    pattern = attention_pattern(frozen.q, frozen.k, scale=head_dim**-0.5, precision="highest")  # [heads queries keys]
    queries = pattern[:, text:], pattern[:, :text]
    weights = [jnp.einsum("hqk,tqr->tkhr", p, a) for p, a in zip(queries, over_rows, strict=True)]
    weights = jnp.concatenate(weights, axis=3)
    targets, rows, _, rank = weights.shape
    mixed = [
        split_heads((b * mod[2]).reshape(-1, b.shape[2]) @ stream.attn.proj.kernel[...].T, head_dim)
        for b, mod, stream in zip(over_columns, mods, streams, strict=True)
    ]
    mixed = jnp.concatenate([m.reshape(targets, -1, heads, head_dim) for m in mixed], axis=1)
    result = []
    for i, (stream, mod) in enumerate(zip(streams, mods, strict=True)):
        width = over_columns[i].shape[2]
        values = stream.attn.qkv.kernel[...][:, -width:].reshape(width, heads, head_dim)
        vectors = jnp.einsum("trhe,dhe->thrd", mixed, values) * (1 + mod[1])
        vectors = vectors - jnp.mean(vectors, axis=3, keepdims=True)
        own = weights[:, text:] if i == 0 else weights[:, :text]
        own = own * frozen.inv_std1[i][None, :, None, None]
        left = jnp.concatenate([over_rows[i], own.reshape(targets, own.shape[1], heads * rank)], axis=2)
        right = jnp.concatenate([over_columns[i], vectors.reshape(targets, heads * rank, width)], axis=1)
        result.append(jnp.einsum("tsr,trd->tsd", left, right))
    return tuple(result)


def products(rows, width, heads, head_dim):
    """Returns the multiplications of a dense hop and of one on factors, for one target."""
    rank = 1 + heads
    dense = 2 * rows * width**2 + rows**2 * width
    factors = 2 * rank * width**2 + heads * rows**2 * rank + 4 * rank * width**2 + rows * (1 + 2 * rank * heads) * width
    return dense, factors


def seconds(work, repeats):
    """Returns the median of the processor's seconds."""
    took = []
    for _ in range(repeats):
        begin = time.process_time()
        jax.block_until_ready(work())
        took.append(time.process_time() - begin)
    return statistics.median(took)


def random_factors(record, frozen, targets):
    """Returns factors of rank 1 + heads whose entries are random: what a hop costs does not depend on them."""
    keys, rank = iter(jax.random.split(jax.random.key(0), 4)), 1 + frozen.q.shape[1]
    over_rows = [jax.random.normal(next(keys), (targets, h.shape[0], rank)) for h in record.boundary]
    return over_rows, [jax.random.normal(next(keys), (targets, rank, h.shape[1])) for h in record.boundary]


def main():
    """Prints the figures."""
    args = PARSER.parse_args()
    trace, tcs, target = attribution.middle()
    record = prepare_step(trace, tcs).record
    block, frozen = slice_layer((record.weights.stacks[0], record.frozen[0]), 3)
    if frozen.mod is None:
        frozen = frozen._replace(mod=block._modulations(record.cond, frozen))
    over_rows, over_columns = random_factors(record, frozen, args.targets)
    with jax.default_matmul_precision("highest"):
        leaving = tuple(jnp.einsum("tsr,trd->tsd", a, b) for a, b in zip(over_rows, over_columns, strict=True))
        dense, factored = jax.jit(dense_hop), jax.jit(hop_on_factors)
        one = lambda: dense(block, frozen, record.cond, leaving)  # noqa: E731
        other = lambda: factored(block, frozen, record.cond, over_rows, over_columns)  # noqa: E731
        apart = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in zip(one(), other(), strict=True))
        hops = [seconds(work, args.repeats) / args.targets for work in (one, other)]
    graph = attribute(trace, tcs, target=target, max_nodes=100, expansion_batch=50, min_attribution=1e-4)
    nodes = graph.target_node.size
    whole = float(np.mean(graph.node_block[graph.target_node].astype(int) > trace.info.recorded[0]))
    settings = {"target": target, "max_nodes": 100, "expansion_batch": 50, "min_attribution": 1e-4}
    per_node = seconds(lambda: attribute(trace, tcs, **settings), 3) / nodes
    saved = whole * (hops[0] - hops[1]) / per_node
    print(f"jax {jax.__version__}, load {os.getloadavg()}, one thread, processor time; {args.targets} targets together")
    print(f"both ways agree to {apart:.1e} of the largest entry (float32)")
    print(f"a hop: dense {1e3 * hops[0]:.2f} ms a target, on factors {1e3 * hops[1]:.2f} ms")
    print(f"seconds per expanded node {per_node:.4f}; {whole:.0%} of {nodes} nodes have a whole block below them")
    print(f"that would save {saved:.1%} of a node")
    for name, shape in (("middle", (320, 512, 8, 64)), ("FLUX, 512 px", (1536, 3072, 24, 128))):
        whole_hop, factors = products(*shape)
        print(f"multiplications of a hop, {name}: {whole_hop / 1e9:.2f}e9 dense, {factors / 1e9:.2f}e9 on factors")


if __name__ == "__main__":
    main()
