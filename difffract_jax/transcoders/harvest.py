"""Rows to train on: the sampler, run on many prompts, with a tap at every chosen MLP sublayer.

1. Chunk number c holds the prompts c P .. c P + P - 1 of an order (`prompts`), each with its own starting noise. Both
   follow from the number, so that chunk c is the same whenever and wherever it is made.
2. At every denoising step every site reports x and y of some tokens: all that count, or `tokens_per_step` of them drawn
   without replacement. T5's padding does not count, unless asked for: the pipeline attends to it, but its rows are
   nearly alike and would be most of the text stream's.
3. All steps run in one compiled scan over all prompts at once; the rows stay on the device. With guidance by two
   branches both evaluations of a step report rows: those of the prompts, then those of the negative prompt.

Which tokens are taken is decided on the host, where the prompts are: there it is known how many rows a chunk holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.address import Group, Layout
from difffract_jax.generators import random_generator
from difffract_jax.models.blocks import Streams
from difffract_jax.models.encoded import EncodedPrompt
from difffract_jax.models.guidance import NegativeBranch, guided
from difffract_jax.models.mmdit import Inputs, MMDiT, forward
from difffract_jax.models.pipeline import Pipeline, Run
from difffract_jax.models.sampler import euler_scan
from difffract_jax.models.sd3_text import t5_ids as ids_of_t5
from difffract_jax.models.sd3_text import text_stream
from difffract_jax.models.stacks import Visit, per_group, sequences
from difffract_jax.models.streaming import jit_resident, streams_layers
from difffract_jax.models.tokenizers import TokenIds, encode_prompt
from difffract_jax.seeds import random_key
from difffract_jax.sharding import AnyMesh
from difffract_jax.transcoders.objective import ActivationRows, Width
from difffract_jax.transcoders.processes import gathered, own_places, placed
from difffract_jax.transcoders.prompts import Prompts
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.text_encoders import HostEncoders


class Chunk(NamedTuple):
    """Rows of some prompts, by group of sites.

    Attributes:
        rows: x [site rows d_model], y [site rows d_model_out], t [rows]; in a group all sites have the same tokens.
        valid: which rows count; the others are filling.
    """

    rows: dict[str, ActivationRows]
    valid: dict[str, Bool[np.ndarray, "rows"]]


@runtime_checkable
class RowSource(Protocol):
    """Where rows come from: the sampler, a store on disk, or arrays of any other origin."""

    @property
    def sites(self) -> SiteSet:
        """Sites it has rows of."""
        ...

    @property
    def width(self) -> Width:
        """Channels of a row; of x and y, where they differ."""
        ...

    def chunk(self, number: int) -> Chunk:
        """Returns chunk `number`, the same whenever it is asked for."""
        ...


@dataclass(frozen=True)
class Sampler:
    """Rows from a running pipeline; a `RowSource`.

    Attributes:
        pipe: the pipeline.
        sites: where to tap it.
        run: sizes and schedule.
        prompts: their order.
        seed: of starting noise and choice of tokens.
        prompts_at_once: P.
        tokens_per_step: most tokens of a prompt that a site reports at a step; None for all.
        include_padding: count the text's padding too, as the reference does.
        sae: report y for x, for an SAE.
        spread: where the prompts' arrays go, a sharding of their first axis; None for the default device.
        encoders: the text encoders, where they lie on the host between uses; None for those of the pipeline.
        negative: what the negative prompt gives, with guidance by two branches; None where a step is one evaluation.
    """

    pipe: Pipeline
    sites: SiteSet
    run: Run
    prompts: Prompts
    seed: int
    prompts_at_once: int
    tokens_per_step: int | None = None
    include_padding: bool = False
    sae: bool = False
    spread: Any = None
    encoders: HostEncoders | None = None
    negative: EncodedPrompt | None = None

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.pipe.config.transformer.d_model

    def chunk(self, number: int) -> Chunk:
        """Runs the sampler on the prompts of chunk `number`."""
        numbers = range(number * self.prompts_at_once, (number + 1) * self.prompts_at_once)
        ids = self._ids(number)
        tokens, valid = self._choose(number, self._masks(ids))
        if self.encoders is None:
            text, pooled = encode_many(self.pipe.t5, self.pipe.clip, *self._sent(ids))
        else:
            text, pooled = self.encoders.take(number, encode_many, lambda n: self._sent(self._ids(n)))
        noise = self.noise(np.array(numbers))
        inputs = Inputs(noise, text, pooled, jnp.zeros(()), self._guidance)
        sigmas = jnp.asarray(self.run.sigmas, noise.dtype)
        negative = None
        if self.negative is not None:
            # NumPy's arrays are the same on all devices of all processes.
            text, pooled = (np.asarray(array) for array in (self.negative.text, self.negative.pooled))
            negative = NegativeBranch(text, pooled, np.asarray(self.run.branch_scale, noise.dtype))
        taken = sample_rows(self.pipe.transformer, inputs, sigmas, tokens, self.run.grid, self.sites, negative)
        rows = {name: ActivationRows(r.y if self.sae else r.x, r.y, r.t) for name, r in taken.items()}
        return Chunk(rows, {name: mask.reshape(-1) for name, mask in valid.items()})

    def noise(self, numbers: Int[np.ndarray, "prompt"]) -> Float[Array, "prompt img channels"]:
        """Returns the starting noise of prompts, by their numbers."""
        channels = self.pipe.config.transformer.in_channels
        sent = placed(numbers.shape, self.spread, lambda at: numbers[at[0]].astype(np.int32))
        return _noise(random_key(self.seed), sent, self.run.grid, channels)

    def _ids(self, number: int) -> dict[int, TokenIds]:
        """Returns the tokens of a chunk's prompts, by place, of those that run on this process's devices."""
        first = number * self.prompts_at_once
        return {
            place: encode_prompt(self.pipe.tokenizers, self.prompts(first + place), self.run.text_tokens)
            for place in own_places(self.prompts_at_once, self.spread)
        }

    def _masks(self, ids: dict[int, TokenIds]) -> Bool[np.ndarray, "prompt txt"]:
        """Returns which text tokens of every prompt of a chunk count, and with two branches as often the negative's."""
        masks = self._own_masks(ids)
        if self.negative is None:
            return masks
        negative = np.asarray(self.negative.mask) | self.include_padding
        return np.concatenate([masks, np.broadcast_to(negative, masks.shape)])

    def _own_masks(self, ids: dict[int, TokenIds]) -> Bool[np.ndarray, "prompt txt"]:
        """Returns which text tokens of every prompt of a chunk count; processes tell one another theirs."""
        mine = np.zeros((self.prompts_at_once, self.run.text_tokens), bool)
        for place, one in ids.items():
            mine[place] = True if self.include_padding else one.t5_mask
        return mine if len(ids) == len(mine) else np.logical_or.reduce(gathered(mine))

    def _sent(self, ids: dict[int, TokenIds]) -> list[Array]:
        """Returns the tokens of a chunk's prompts, where they are encoded."""
        t5, clip = ({place: getattr(one, name) for place, one in ids.items()} for name in ("t5_ids", "clip_ids"))
        return [self._send(rows) for rows in (t5, clip)]

    @property
    def _guidance(self) -> Array | None:
        return None if self.run.fed_guidance is None else jnp.asarray(self.run.fed_guidance, jnp.float32)

    def _send(self, rows: dict[int, np.ndarray]) -> Array:
        """Sends arrays of prompts, by place, to where the prompts run."""
        shape = self.prompts_at_once, *next(iter(rows.values())).shape
        return placed(shape, self.spread, lambda at: np.stack([rows[n] for n in range(at[0].start, at[0].stop)]))

    def _places(self, group: Group) -> int:
        """Returns how many tokens of a prompt the group's sites report at a step."""
        rows = group.rows(self.run.tokens)
        return min(rows, self.tokens_per_step or rows)

    def _choose(
        self, number: int, masks: Bool[np.ndarray, "prompt txt"]
    ) -> tuple[dict[str, Array], dict[str, Bool[np.ndarray, "step prompt place"]]]:
        """Returns which tokens each group reports, [step prompt place], and which of these places are filled.

        With two branches tokens are [step branch prompt place], and the places [step branch*prompt place].
        Every process draws for all prompts, as the draws follow from one another, and sorts those of its own.
        """
        rng = random_generator(self.seed, number)
        steps, prompts = self.run.steps, len(masks)
        front = (steps,) if self.negative is None else (steps, self.run.branches)
        before = [None] * len(front)
        spread = self.spread and NamedSharding(self.spread.mesh, PartitionSpec(*before, *self.spread.spec))
        counts = Streams(np.ones((prompts, self.run.tokens.img), bool), masks)
        groups = [group for group, _ in self.sites.members]
        tokens, valid = {}, {}
        for group, live in zip(groups, sequences(counts, groups, axis=1), strict=True):
            counted = np.broadcast_to(live, (steps, *live.shape))
            # Sorting random numbers draws without replacement; 2 puts what does not count behind all that does.
            draw = np.where(counted, rng.random(counted.shape), 2.0)
            places = self._places(group)
            valid[group.name] = np.arange(places) < np.minimum(counted.sum(-1, keepdims=True), places)

            draw = draw.reshape(*front, -1, draw.shape[-1])

            def first_of(at: tuple[slice, ...], draw: np.ndarray = draw, places: int = places) -> np.ndarray:
                return np.argsort(draw[..., at[-2], :], axis=-1, kind="stable")[..., :places].astype(np.int32)

            tokens[group.name] = placed((*draw.shape[:-1], places), spread, first_of)
        return tokens, valid


def prompts_sharding(count: int, mesh: AnyMesh) -> NamedSharding:
    """Returns how prompts that run together lie on a mesh: over `data` and `site`, or those of them that divide."""
    split = [axis for axis in ("data", "site") if mesh.shape[axis] > 1]
    while split and count % prod(mesh.shape[axis] for axis in split):
        split.pop()
    return NamedSharding(mesh, PartitionSpec(tuple(split) or None))


@jit_resident
def encode_many(t5: Any, clip: Any, t5_ids: Array, clip_ids: Array) -> tuple[Array, Array]:
    """Returns the text and the pooled embeddings of several prompts."""
    text = jax.vmap(lambda ids: t5(ids_of_t5(clip, ids)))(t5_ids)
    states, pooled = jax.vmap(clip)(clip_ids)
    return jax.vmap(partial(text_stream, clip))(states, text), pooled


@partial(jax.jit, static_argnames=("grid", "channels"))
def _noise(
    key: Array, numbers: Int[Array, "prompt"], grid: tuple[int, int], channels: int
) -> Float[Array, "prompt img channels"]:
    draw = partial(jax.random.normal, shape=(grid[0] * grid[1], channels), dtype=jnp.float32)
    return jax.vmap(lambda number: draw(jax.random.fold_in(key, number)))(numbers)


@partial(jit_resident, static_argnames=("grid", "sites"))
def sample_rows(
    model: MMDiT,
    inputs: Inputs,
    sigmas: Float[Array, "step_and_end"],
    tokens: dict[str, Int[Array, "step *branch prompt place"]],
    grid: tuple[int, int],
    sites: SiteSet,
    negative: NegativeBranch | None = None,
) -> dict[str, ActivationRows]:
    """Runs the sampler on several prompts at once, and returns what the sites computed at some tokens.

    Args:
        model: the transformer.
        inputs: of every prompt, on a leading axis, but for `t`, which is not read, and `guidance`; starting noise.
        sigmas: noise level entering every step, and the final 0.
        tokens: by group of sites, the tokens to report.
        grid: rows and columns of image tokens.
        sites: where to tap.
        negative: with guidance by two branches; then `tokens` have an axis of branches behind that of steps.

    Returns:
        By group, x and y [site rows d_model] and t [rows], where rows are (step, prompt, place), or with two branches
        (step, branch, prompt, place).
    """
    one = partial(tapped_velocity, model, grid=grid, sites=sites)
    over_prompts = jax.vmap(one, in_axes=(Inputs(0, 0, 0, None, None), 0))  # pyright: ignore[reportArgumentType]
    with_negative = jax.vmap(one, in_axes=(Inputs(0, None, None, None, None), 0))  # pyright: ignore

    def evaluate(
        z: Array, sigma: Array, number: Array, places: dict[str, Array]
    ) -> tuple[Array, dict[str, ActivationRows]]:
        del number
        now = inputs._replace(latents=z, t=sigma)
        if negative is None:
            return over_prompts(now, places)
        mine, theirs = ({name: at[branch] for name, at in places.items()} for branch in range(2))
        positive, rows = over_prompts(now, mine)
        other, more = with_negative(now._replace(text=negative.text, pooled=negative.pooled), theirs)
        v = [velocity.astype(z.dtype) for velocity in (positive, other)]
        return guided(v, negative.scale), jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, more)

    _, reported = euler_scan(evaluate, inputs.latents, sigmas, tokens, streamed=streams_layers(model))

    def flatten(a: Float[Array, "step prompt site place d_model"]) -> Float[Array, "site rows d_model"]:
        return a.transpose(2, 0, 1, 3, 4).reshape(a.shape[2], -1, a.shape[4])

    return {
        name: ActivationRows(flatten(rows.x), flatten(rows.y), rows.t.reshape(-1)) for name, rows in reported.items()
    }


def tapped_velocity(
    model: MMDiT, inputs: Inputs, tokens: dict[str, Int[Array, "place"]], *, grid: tuple[int, int], sites: SiteSet
) -> tuple[Float[Array, "img outputs"], dict[str, ActivationRows]]:
    """Returns the velocity of one prompt, and what the sites computed.

    Args:
        model: the transformer.
        inputs: of one evaluation.
        tokens: by group of sites, the tokens to report.
        grid: rows and columns of image tokens.
        sites: where to tap.

    Returns:
        The velocity; and by group x and y [site place d_model] and t [place].
    """
    layout, streamed = model.config.layout, streams_layers(model)
    # Where blocks are programs of their own, one that knew the tokens would be compiled anew for every prompt.
    taps: Any = _in_and_out
    if not streamed:
        taps = [partial(_taken, [tokens.get(group.name) for group in stack.groups]) for stack in layout.stacks]
    velocity, reports = forward(model, inputs, grid, tap=taps, kept=site_layers(sites, layout))
    rows = {}
    for name, both in by_group(per_group(reports), sites, layout).items():
        if name not in tokens:
            continue
        x, y = _at_tokens(both, tokens[name]) if streamed else both
        rows[name] = ActivationRows(x, y, jnp.full(tokens[name].shape, inputs.t, jnp.float32))
    return velocity, rows


@jax.jit
def _at_tokens(both: tuple[Array, Array], tokens: Array) -> tuple[Array, Array]:
    x, y = (rows[:, tokens] for rows in both)
    return x, y


def _in_and_out(visit: Visit) -> tuple[tuple[Array, Array], ...]:
    return tuple(zip(visit.acts.mlp_in, visit.acts.mlp_out, strict=True))


def _taken(tokens: Sequence[Int[Array, "_"] | None], visit: Visit) -> tuple[Any, ...]:
    """Returns what a block's MLPs read and wrote at the tokens wanted, before blocks are laid side by side."""
    both = zip(tokens, visit.acts.mlp_in, visit.acts.mlp_out, strict=True)
    return tuple(None if at is None else (x[at], y[at]) for at, x, y in both)


def site_layers(sites: SiteSet, layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Returns, per group of a model, the layers of its stack that have a site."""
    starts = (layout.blocks_of(number).start for number in range(len(layout.groups)))
    return tuple(
        tuple(block - start for block in slots) for start, slots in zip(starts, sites.slots(layout), strict=True)
    )


def by_group(reports: Sequence[Any], sites: SiteSet, layout: Layout) -> dict[str, Any]:
    """Puts together what the sites of a group reported in several stacks.

    Args:
        reports: per group of the model, a tree with a leading axis of its sites; not read where it has none.
        sites: that reported.
        layout: of the model.

    Returns:
        Name of a group -> the same tree, with a leading axis of all its sites.
    """
    parts: dict[str, list[Any]] = {}
    for group, layers, report in zip(layout.groups, site_layers(sites, layout), reports, strict=True):
        if layers:
            parts.setdefault(group.name, []).append(report)
    return {name: jax.tree.map(lambda *leaves: _chain(leaves), *trees) for name, trees in parts.items()}


def _chain(leaves: Sequence[Array]) -> Array:
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)


def collect_rows(
    source: RowSource, group: str, numbers: range, progress: Callable[[int, int], None] | None = None
) -> ActivationRows:
    """Returns the valid rows of one group in several chunks; for evaluation and tests.

    Args:
        source: where from.
        group: its name.
        numbers: of the chunks.
        progress: called with (chunks done, chunks in all).
    """
    parts = []
    for done, number in enumerate(numbers, 1):
        chunk = source.chunk(number)
        keep = np.flatnonzero(chunk.valid[group])
        rows = chunk.rows[group]
        parts.append(ActivationRows(rows.x[:, keep], rows.y[:, keep], rows.t[keep]))
        if progress is not None:
            progress(done, len(numbers))
    return ActivationRows(*(jnp.concatenate([part[i] for part in parts], axis=1 if i < 2 else 0) for i in range(3)))
