"""Rows to train on: the sampler, run on many prompts, with a tap at every chosen MLP sublayer.

1. Chunk number c holds the prompts c P .. c P + P - 1 of an order (`prompts`), each with its own starting noise. Both
   follow from the number, so that chunk c is the same whenever and wherever it is made.
2. At every denoising step every site reports x and y of some tokens: all that count, or `tokens_per_step` of them drawn
   without replacement. T5's padding does not count, unless asked for: the pipeline attends to it, but its rows are
   nearly alike and would be most of the text stream's.
3. All steps run in one compiled scan over all prompts at once; the rows stay on the device.

Which tokens are taken is decided on the host, where the prompts are: there it is known how many rows a chunk holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.models.blocks import join, split
from difffract_jax.models.mmdit import Inputs, MMDiT, run_double, run_single
from difffract_jax.models.pipeline import Pipeline, Run
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.transcoders.objective import Rows
from difffract_jax.transcoders.prompts import Prompts
from difffract_jax.transcoders.sites import Sites


class Chunk(NamedTuple):
    """Rows of some prompts, by group of sites.

    Attributes:
        rows: x and y [site rows d_model], t [rows]; in a group all sites have the same tokens.
        valid: which rows count; the others are filling.
    """

    rows: dict[str, Rows]
    valid: dict[str, Bool[np.ndarray, "rows"]]


@runtime_checkable
class RowSource(Protocol):
    """Where rows come from: the sampler, or a store on disk."""

    @property
    def sites(self) -> Sites:
        """Sites it has rows of."""
        ...

    @property
    def width(self) -> int:
        """Channels of a row."""
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
        include_padding: count T5's padding too, as the reference does.
        sae: report y for x, for an SAE.
        spread: where the prompts' arrays go, a sharding of their first axis; None for the default device.
    """

    pipe: Pipeline
    sites: Sites
    run: Run
    prompts: Prompts
    seed: int
    prompts_at_once: int
    tokens_per_step: int | None = None
    include_padding: bool = False
    sae: bool = False
    spread: Any = None

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.pipe.config.transformer.d_model

    def chunk(self, number: int) -> Chunk:
        """Runs the sampler on the prompts of chunk `number`."""
        numbers = range(number * self.prompts_at_once, (number + 1) * self.prompts_at_once)
        ids = [encode_prompt(self.pipe.tokenizers, self.prompts(n), self.run.text_tokens) for n in numbers]
        masks = np.stack([np.ones_like(one.t5_mask) if self.include_padding else one.t5_mask for one in ids])
        tokens, valid = self._choose(number, masks)
        encoded = self._send(np.stack([one.t5_ids for one in ids]), np.stack([one.clip_ids for one in ids]))
        text, pooled = _encode_many(self.pipe.t5, self.pipe.clip, *encoded)
        noise = self.noise(np.array(numbers))
        inputs = Inputs(noise, text, pooled, jnp.zeros(()), self._guidance)
        sigmas = jnp.asarray(self.run.sigmas, noise.dtype)
        taken = sample_rows(self.pipe.transformer, inputs, sigmas, tokens, self.run.grid, self.sites)
        rows = {name: Rows(r.y if self.sae else r.x, r.y, r.t) for name, r in taken.items()}
        return Chunk(rows, {name: mask.reshape(-1) for name, mask in valid.items()})

    def noise(self, numbers: Int[np.ndarray, "prompt"]) -> Float[Array, "prompt img channels"]:
        """Returns the starting noise of prompts, by their numbers."""
        channels = self.pipe.config.transformer.in_channels
        return _noise(jax.random.key(self.seed), self._send(numbers)[0], self.run.grid, channels)

    @property
    def _guidance(self) -> Array | None:
        return None if self.run.guidance is None else jnp.asarray(self.run.guidance, jnp.float32)

    def _send(self, *arrays: np.ndarray) -> list[Array]:
        return [jax.device_put(array, self.spread) for array in arrays]

    def _tokens(self, group: str) -> int:
        img, txt = self.run.grid[0] * self.run.grid[1], self.run.text_tokens
        return {"img": img, "txt": txt, "joint": txt + img}[group]

    def _places(self, group: str) -> int:
        return min(self._tokens(group), self.tokens_per_step or self._tokens(group))

    def _choose(
        self, number: int, masks: Bool[np.ndarray, "prompt txt"]
    ) -> tuple[dict[str, Array], dict[str, Bool[np.ndarray, "step prompt place"]]]:
        """Returns which tokens each group reports, [step prompt place], and which of these places are filled."""
        rng = np.random.default_rng((self.seed, number))
        steps, prompts = len(self.run.sigmas) - 1, len(masks)
        image = np.ones((prompts, self._tokens("img")), bool)
        counts = {"img": image, "txt": masks, "joint": np.concatenate([masks, image], axis=1)}
        tokens, valid = {}, {}
        for group in self.sites.groups:
            counted = np.broadcast_to(counts[group], (steps, *counts[group].shape))
            # Sorting random numbers draws without replacement; 2 puts what does not count behind all that does.
            draw = np.where(counted, rng.random(counted.shape), 2.0)
            order = np.argsort(draw, axis=-1, kind="stable")[..., : self._places(group)]
            valid[group] = np.take_along_axis(counted, order, axis=-1)
            tokens[group] = jnp.asarray(order, jnp.int32)
        return tokens, valid


@jax.jit
def _encode_many(t5: Any, clip: Any, t5_ids: Array, clip_ids: Array) -> tuple[Array, Array]:
    return jax.vmap(t5)(t5_ids), jax.vmap(lambda ids: clip(ids)[1])(clip_ids)


@partial(jax.jit, static_argnames=("grid", "channels"))
def _noise(
    key: Array, numbers: Int[Array, "prompt"], grid: tuple[int, int], channels: int
) -> Float[Array, "prompt img channels"]:
    draw = partial(jax.random.normal, shape=(grid[0] * grid[1], channels), dtype=jnp.float32)
    return jax.vmap(lambda number: draw(jax.random.fold_in(key, number)))(numbers)


@partial(jax.jit, static_argnames=("grid", "sites"))
def sample_rows(
    model: MMDiT,
    inputs: Inputs,
    sigmas: Float[Array, "step_and_end"],
    tokens: dict[str, Int[Array, "step prompt place"]],
    grid: tuple[int, int],
    sites: Sites,
) -> dict[str, Rows]:
    """Runs the sampler on several prompts at once, and returns what the sites computed at some tokens.

    Args:
        model: the transformer.
        inputs: of every prompt, on a leading axis, but for `t`, which is not read, and `guidance`; starting noise.
        sigmas: noise level entering every step, and the final 0.
        tokens: by group of sites, the tokens to report.
        grid: rows and columns of image tokens.
        sites: where to tap.

    Returns:
        By group, x and y [site rows d_model] and t [rows], where rows are (step, prompt, place).
    """
    one = partial(tapped_velocity, model, grid=grid, sites=sites)
    over_prompts = jax.vmap(one, in_axes=(Inputs(0, 0, 0, None, None), 0))  # pyright: ignore[reportArgumentType]

    def step(z: Array, now: tuple[Array, Array, dict[str, Array]]) -> tuple[Array, dict[str, Rows]]:
        sigma, after, places = now
        v, rows = over_prompts(inputs._replace(latents=z, t=sigma), places)
        return z + (after - sigma) * v.astype(z.dtype), rows

    _, found = jax.lax.scan(step, inputs.latents, (sigmas[:-1], sigmas[1:], tokens))

    def flatten(a: Float[Array, "step prompt site place d_model"]) -> Float[Array, "site rows d_model"]:
        return a.transpose(2, 0, 1, 3, 4).reshape(a.shape[2], -1, a.shape[4])

    return {name: Rows(flatten(rows.x), flatten(rows.y), rows.t.reshape(-1)) for name, rows in found.items()}


def tapped_velocity(
    model: MMDiT, inputs: Inputs, tokens: dict[str, Int[Array, "place"]], *, grid: tuple[int, int], sites: Sites
) -> tuple[Float[Array, "img outputs"], dict[str, Rows]]:
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
    h, cond = model.embed(inputs, grid)
    h, double = run_double(model.double, h, cond, tap=_in_and_out)
    joint, single = run_single(model.single, join(h), cond, tap=_in_and_out)
    found = {
        "img": tuple(a.img for a in double),
        "txt": tuple(a.txt for a in double),
        "joint": single,
    }
    rows = {}
    for group, places in tokens.items():
        layers = np.array(sites.groups[group])
        x, y = (a[layers][:, places] for a in found[group])
        rows[group] = Rows(x, y, jnp.full(places.shape, inputs.t, jnp.float32))
    return model.final(split(joint, h.txt.shape[0]).img, cond), rows


def _in_and_out(acts: Any) -> tuple[Any, Any]:
    return acts.mlp_in, acts.mlp_out


def rows_of(source: RowSource, group: str, numbers: range, progress: Callable[[int, int], None] | None = None) -> Rows:
    """Returns the valid rows of one group in several chunks; for evaluation and tests.

    Args:
        source: where from.
        group: `img`, `txt` or `joint`.
        numbers: of the chunks.
        progress: called with (chunks done, chunks in all).
    """
    parts = []
    for done, number in enumerate(numbers, 1):
        chunk = source.chunk(number)
        keep = np.flatnonzero(chunk.valid[group])
        rows = chunk.rows[group]
        parts.append(Rows(rows.x[:, keep], rows.y[:, keep], rows.t[keep]))
        if progress is not None:
            progress(done, len(numbers))
    return Rows(*(jnp.concatenate([part[i] for part in parts], axis=1 if i < 2 else 0) for i in range(3)))
