"""One training step and one chunk of rows on a TPU slice, counted: products, memory traffic, and what chips exchange.

1. `step_collectives` lists what the chips of a mesh exchange in a step. It is the same list that `compiled.collectives`
   reads from a compiled program, and tests hold the two to one another, by kind and bytes:

       over `feature`  y^ of every row, `aux`'s share of it, and the gradient of the encoder's input: an all-reduce
                       each; the encoder's input, gathered once (twice where all three axes split); scale and shift, cut
                       into halves and put together again; counts of a row's features for the cut-offs
       over `data`     the gradient of every weight, `aux`'s of the decoder besides, which features fired: all-reduce
       over `site`     nothing

2. `step_traffic` counts what a chip's memory gives and takes: weights, moments and gradients, and the pre-activations,
   which `batchtopk` reads once for each of its `CUTOFF_HALVINGS`; nothing is counted for dead features.
3. `chunk_cost` counts the same of a chunk of prompts on its way through the text encoders and the model, whose weights
   are gathered over `data` and `site` while a block runs.

Bytes are those of one chip. Products count at the bfloat16 rate: those of the model as a chip takes them by default,
one pass; those of a step in float32 (`matmul: f32`) as the six passes that exact factors take. Among the exchanges the
search for `aux`'s cut-offs counts, as it does in the compiled program: it runs where more features are dead than `aux`
may use.
"""

from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from difffract_jax.models.qwen3 import Qwen3Config
from difffract_jax.models.stacks import depth_of
from difffract_jax.transcoders.compiled import Collective, bytes_per_chip
from difffract_jax.transcoders.harvest import prompts_sharding
from difffract_jax.transcoders.plan import TrainingWorkload
from difffract_jax.transcoders.recipe import encoders_on_host, row_flops
from difffract_jax.transcoders.setup import Setup
from difffract_jax.transcoders.text_encoders import CHUNKS
from difffract_jax.transcoders.transcoder import CUTOFF_HALVINGS

WIDE = 4
"""Bytes of a float32 number."""
FLOAT32_PASSES = 6
"""Products of bfloat16 numbers that a TPU makes of one of float32 numbers at JAX's precision `highest`."""
AUX_HALVINGS = 31
"""Halvings of the bits of a float32 number, see `revival.row_cutoffs`."""
WEIGHTS_MOVED = 11
"""Times that all weights of a site pass between memory and what computes: weights and both moments read and written;
the gradient written, read for its norm and for the update; weights read forward and backward."""
CODES_MOVED = 9
"""Times that pre-activations do: written, read for the code, its sums and the decoder; backward the same again, for
both kernels and the encoder's input."""
BLOCK_ARRAYS = 30
"""Arrays of a row's channels that a block of the model reads and writes."""


class Cost(NamedTuple):
    """What a program asks of one chip.

    Attributes:
        flops: operations of its products.
        traffic: bytes between its memory and what computes.
        exchanged: what it exchanges with other chips.
        sent: bytes that its host sends to it.
        prompts: that the host prepares.
    """

    flops: float
    traffic: float
    exchanged: tuple[Collective, ...]
    sent: float = 0.0
    prompts: int = 0


def step_cost(setup: Setup, weights: int) -> Cost:
    """Counts a step of a training on a chip of its mesh, which may be abstract.

    Args:
        setup: of the run.
        weights: bytes of one site's weights on a chip.
    """
    rows, chips = setup.settings.batch * len(setup.sites.names), prod(setup.mesh.shape.values())
    passes = 1 if setup.recipe.objective.bf16 else FLOAT32_PASSES
    flops = passes * row_flops(setup.shape, setup.recipe) * rows / chips
    return Cost(flops, step_traffic(setup, weights), tuple(step_collectives(setup, weights)))


def step_collectives(setup: Setup, weights: int) -> list[Collective]:
    """Returns what the chips exchange in a step; scalars are left out.

    Sites that take turns exchange one after another, others all at once: fewer operations, as many bytes.

    Args:
        setup: of the run.
        weights: bytes of one site's weights on a chip.
    """
    mesh, sites = setup.mesh.shape, len(setup.sites.names) // setup.mesh.shape["site"]
    turns, together = (sites, 1) if setup.recipe.in_turn else (1, sites)
    each = [*_over_feature(setup), *_over_data(setup, weights)]
    kept = [one for one in each if mesh[one[0]] > 1 and one[2] > 0]
    return [Collective(kind, mesh[axis], round(size * together), times * turns) for axis, kind, size, times in kept]


def _over_feature(setup: Setup) -> list[tuple[str, str, float, int]]:
    """Returns axis, kind, bytes and times of what is exchanged over `feature` for one site."""
    shape, mesh = setup.shape, setup.mesh.shape
    rows, split = setup.settings.batch // mesh["data"], mesh["feature"]
    read, written, column = rows * shape.d_model * WIDE, rows * shape.d_model_out * WIDE, rows * WIDE
    found = [("all-reduce", written, 1), ("all-reduce", column, 2)]
    if shape.activation == "batchtopk":
        found.append(("all-reduce", column, CUTOFF_HALVINGS))
    if shape.activation == "topk":
        found.append(("all-gather", column * shape.features, 1))
    if _revives(setup):
        found += [("all-reduce", written, 1), ("all-reduce", column, AUX_HALVINGS)]
    if shape.time_embed:
        # Scale and shift come from one kernel that is split by its columns: each half lies on half of the chips.
        halves, gathered = (1 if split == 2 else 5 / split), (2 if min(mesh.values()) > 1 else 1)
        found += [
            ("all-reduce", read, 1),
            ("all-reduce", column * shape.time_embed, 1),
            ("all-gather", read, gathered),
            ("collective-permute", read * halves, 1),
            ("all-to-all", 4 * read / split, 1),
        ]
    return [("feature", kind, float(size), times) for kind, size, times in found]


def _over_data(setup: Setup, weights: int) -> list[tuple[str, str, float, int]]:
    """Returns the same of what is exchanged over `data`."""
    shape, features = setup.shape, setup.shape.features // setup.mesh.shape["feature"]
    found = [("all-reduce", weights, 1), ("all-reduce", features, 1)]
    found.append(("all-reduce", shape.d_model_out * WIDE, 2))
    if _revives(setup):
        found += [("all-reduce", features * shape.d_model_out * WIDE, 1), ("all-reduce", shape.d_model_out * WIDE, 2)]
    return [("data", kind, float(size), times) for kind, size, times in found]


def _revives(setup: Setup) -> bool:
    return "topk" in setup.shape.activation and setup.recipe.objective.aux_weight > 0


def step_traffic(setup: Setup, weights: int) -> float:
    """Returns the bytes that a chip's memory gives and takes in a step; arguments as `step_collectives`."""
    mesh, shape = setup.mesh.shape, setup.shape
    sites = len(setup.sites.names) // mesh["site"]
    codes = WIDE * setup.settings.batch * shape.features / (mesh["data"] * mesh["feature"])
    reads = CODES_MOVED + (CUTOFF_HALVINGS + 1 if shape.activation == "batchtopk" else 0)
    rows = 6 * WIDE * (shape.d_model + shape.d_model_out) * setup.settings.batch / mesh["data"]
    return sites * (WEIGHTS_MOVED * weights + reads * codes + rows)


def rows_of_prompt(work: TrainingWorkload) -> int:
    """Returns the rows that a prompt gives to a site of the group that gets most."""
    assert work.run is not None
    most = work.settings.tokens_per_step
    sizes = [group.rows(work.run.tokens) for group, _ in work.sites.members]
    return work.run.steps * work.run.branches * max(min(size, most or size) for size in sizes)


def chunk_cost(work: TrainingWorkload, setup: Setup) -> Cost:
    """Counts a chunk of prompts, from words to rows, on a chip of a mesh; `work` has a model and a run.

    Prompts lie over `data` and `site` as far as they divide, a block's columns over `feature`.
    """
    assert work.run is not None
    count, mesh, steps = work.settings.prompts_at_once, setup.mesh, work.run.steps * work.run.branches
    spread: Any = prompts_sharding(count, mesh).spec[0] or ()
    prompts = count / prod(mesh.shape[axis] for axis in ((spread,) if isinstance(spread, str) else spread))
    split, chips = mesh.shape["feature"], prod(mesh.shape.values())
    gathered = chips // split
    streams = work.run.tokens.img + work.run.tokens.txt
    parts = [("transformer", work.model["transformer"].stacks, streams, steps)]
    if "t5" in work.model:
        parts.append(("t5", (work.model["t5"].blocks,), work.run.tokens.txt, 1))
    flops, traffic, exchanged = 0.0, 0.0, []
    for name, stacks, tokens, times in parts:
        weights, depth = bytes_per_chip(stacks), sum(depth_of(stack) for stack in stacks)
        config = work.model[name].config
        products = _block_flops(work, name, tokens)
        flops += times * prompts * products / split
        width = config.width if isinstance(config, Qwen3Config) else config.d_model
        wide = prompts * tokens * width * _itemsize(work.model[name])
        traffic += times * (weights / split + BLOCK_ARRAYS * depth * wide / split)
        if gathered > 1:
            exchanged.append(Collective("all-gather", gathered, round(weights / split / depth), depth * times))
        if split > 1:
            exchanged.append(Collective("all-reduce", split, round(wide), 2 * depth * times))
            # q, k and v come from one kernel that is split by its columns, and move to where their heads are.
            exchanged.append(Collective("collective-permute", split, round(3 * wide / split), depth * times))
    on_host = encoders_on_host(work.settings, "tpu")
    visiting = [work.model[name] for name in ("t5", "clip") if name in work.model and on_host]
    sent = bytes_per_chip(visiting) / chips / CHUNKS
    if work.settings.weights != "device":
        sent += steps * bytes_per_chip(work.model["transformer"].stacks)  # block by block, to one device
    return Cost(flops, traffic, tuple(exchanged), sent, count)


def _block_flops(work: TrainingWorkload, name: str, tokens: int) -> float:
    """Returns the operations of one prompt in all blocks of a part: twice each weight and token, and attention's own.

    A double-stream block has weights for each of its streams, and its tokens go through their own.
    """
    assert work.run is not None
    config = work.model[name].config
    if name == "t5":
        weights = sum(leaf.size for leaf in jax.tree.leaves(work.model[name].blocks))
        head_dim = config.head_dim if isinstance(config, Qwen3Config) else config.d_kv
        return float(2 * weights * tokens + 4 * config.layers * tokens**2 * config.heads * head_dim)
    # An MLP has one matrix of d_model rows per array of its hidden layer: up and down, in FLUX.2 gate, up and down.
    mlp, depth = config.hidden_ratio, sum(depth_of(stack) for stack in work.model[name].stacks)
    return float(depth * (2 * (4 + mlp) * tokens * config.d_model**2 + 4 * tokens**2 * config.d_model))


def _itemsize(tree: Any) -> int:
    return np.dtype(jax.tree.leaves(tree)[0].dtype).itemsize
