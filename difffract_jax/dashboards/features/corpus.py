"""The corpus of a scan: its prompts in batches, and one denoising step of a batch with a tap at every site.

With guidance by two branches a step is two evaluations, the second with a negative prompt that all prompts share; both
are scanned, and what is counted by step elsewhere is counted by evaluation.

Prompt number n starts from the noise of seed `seed + n`, as `difffract generate --seed` draws it, so that every example
can be made, traced and steered again. Batches are cut by number: batch b is the same whenever and wherever it is made.
The last one is filled up with its own prompts, which then do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.address import Group, Tokens
from difffract_jax.config import SEEDS
from difffract_jax.generators import random_generator
from difffract_jax.models.blocks import Streams
from difffract_jax.models.encoded import EncodedPrompt
from difffract_jax.models.guidance import NegativeBranch, step_velocity
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.pipeline import Pipeline, Run, encode, initial_noise
from difffract_jax.models.stacks import sequences
from difffract_jax.models.streaming import jit_resident
from difffract_jax.models.tokenizers import encode_prompt, written_tokens
from difffract_jax.spread import MODEL_AXES
from difffract_jax.transcoders.harvest import encode_many, tapped_velocity
from difffract_jax.transcoders.sites import SiteSet


class Batch(NamedTuple):
    """Prompts that run together.

    Attributes:
        numbers: of the prompts.
        own: which of them count; the others fill the batch up.
        text: text embeddings.
        pooled: pooled embeddings.
        noise: packed starting noise.
        masks: text tokens that are the prompt's own, its closing one included.
    """

    numbers: Int[np.ndarray, "prompt"]
    own: Bool[np.ndarray, "prompt"]
    text: Float[Array, "prompt txt text_width"]
    pooled: Float[Array, "prompt pooled_width"]
    noise: Float[Array, "prompt img channels"]
    masks: Bool[np.ndarray, "prompt txt"]


@dataclass(frozen=True)
class Corpus:
    """Prompts to run a pipeline on.

    Attributes:
        pipe: the pipeline.
        run: sizes and schedule.
        prompts: all of them.
        seed: of the first prompt's noise.
        batch: prompts that run together.
        mesh: devices to spread them over, by its axis `data` where that divides them; None for one device.
    """

    pipe: Pipeline
    run: Run
    prompts: tuple[str, ...]
    seed: int
    batch: int
    mesh: Mesh | None = None

    @cached_property
    def negative(self) -> EncodedPrompt | None:
        """What the negative prompt gives; None where a step is one evaluation."""
        return None if self.run.branches == 1 else encode(self.pipe, self.run.negative_prompt, self.run.text_tokens)

    @property
    def negative_branch(self) -> NegativeBranch | None:
        """What the second evaluation of a step needs, as NumPy arrays, which are the same on all devices."""
        if self.negative is None:
            return None
        scale = np.asarray(self.run.branch_scale, np.float32)
        return NegativeBranch(np.asarray(self.negative.text), np.asarray(self.negative.pooled), scale)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.prompts) // self.batch)

    @property
    def ranks(self) -> Int[np.ndarray, "prompt"]:
        """Place of every prompt in a random order, which the sample of each feature goes by."""
        return random_generator(self.seed, 0).permutation(len(self.prompts)).astype(np.int32)

    def noise_seed(self, number: int) -> int:
        """Returns the seed of a prompt's starting noise."""
        return (self.seed + number) % SEEDS

    def batch_of(self, numbers: Sequence[int]) -> Batch:
        """Returns some prompts to run together, at most `batch`.

        Args:
            numbers: of the prompts.
        """
        filled = np.resize(np.asarray(numbers, np.int64), self.batch)
        tokens = [encode_prompt(self.pipe.tokenizers, self.prompts[n], self.run.text_tokens) for n in filled]
        if self.pipe.known is None:
            ids = [self._send(np.stack([getattr(one, name) for one in tokens])) for name in ("t5_ids", "clip_ids")]
            text, pooled = encode_many(self.pipe.t5, self.pipe.clip, *ids)
        else:
            made = [encode(self.pipe, self.prompts[n], self.run.text_tokens) for n in filled]
            text, pooled = (self._send(jnp.stack([getattr(one, name) for one in made])) for name in ("text", "pooled"))
        noise = jnp.stack([initial_noise(self.pipe, self.run, self.noise_seed(int(n))) for n in filled])
        own = np.arange(self.batch) < len(numbers)
        return Batch(filled, own, text, pooled, self._send(noise), np.stack([one.t5_mask for one in tokens]))

    def tokens_of(self, number: int) -> list[str]:
        """Returns a prompt's text tokens without padding, as its tokenizer writes them."""
        return self.written(self.prompts[number])

    def written(self, prompt: str) -> list[str]:
        """Returns the text tokens of any prompt, without padding, as the tokenizer writes them."""
        ids = encode_prompt(self.pipe.tokenizers, prompt, self.run.text_tokens)
        words = written_tokens(self.pipe.tokenizers, ids)
        return [word for word, counted in zip(words, ids.t5_mask, strict=True) if counted]

    def counted(self, batch: Batch, group: Group, branch: int = 0) -> Bool[np.ndarray, "prompt row"]:
        """Returns which rows of a group's sequence count, of every prompt, in the evaluations of a branch."""
        images, masks = np.ones((self.batch, self.run.tokens.img), bool), batch.masks
        if branch and self.negative is not None:
            masks = np.broadcast_to(np.asarray(self.negative.mask), masks.shape)
        (rows,) = sequences(Streams(images, masks), (group,), axis=1)
        return np.asarray(rows) & batch.own[:, None]

    def text_rows(self, group: Group) -> Bool[np.ndarray, "row"]:
        """Returns which rows of a group's sequence are of the text."""
        tokens = self.run.tokens
        (rows,) = sequences(Streams(np.zeros(tokens.img, bool), np.ones(tokens.txt, bool)), (group,), axis=0)
        return np.asarray(rows)

    def features_sharding(self) -> NamedSharding | None:
        """Returns how arrays [site feat ...] lie on the mesh: features over the axes that split a model."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(None, MODEL_AXES))

    def peaks_sharding(self) -> NamedSharding | None:
        """Returns how arrays [site prompt feat] lie on the mesh."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, self._prompt_axis, MODEL_AXES))

    @property
    def _prompt_axis(self) -> str | None:
        assert self.mesh is not None
        return None if self.batch % self.mesh.shape["data"] else "data"

    def _send(self, array: Any) -> Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(self._prompt_axis)))


def step_with_taps(
    corpus: Corpus, batch: Batch, latents: Float[Array, "prompt img channels"], step: int, sites: SiteSet, role: str
) -> tuple[Float[Array, "prompt img channels"], list[dict[str, Any]]]:
    """Takes one denoising step of a batch.

    Args:
        corpus: what runs.
        batch: its prompts.
        latents: entering the step.
        step: its number.
        sites: where to tap.
        role: `transcoder` to report what MLPs read, `sae` what they wrote.

    Returns:
        Latents after the step; and of each of its evaluations, by group what its sites report, [prompt site row
        d_model].
    """
    run = corpus.run
    sigmas = jnp.asarray(run.sigmas, latents.dtype)
    given = batch.text, batch.pooled, sigmas[step], sigmas[step + 1], corpus.negative_branch
    fixed = run.grid, run.fed_guidance, sites, role
    after, read = _advance(corpus.pipe.transformer, latents, *given, *fixed)
    return after, [{name: rows[branch] for name, rows in read.items()} for branch in range(run.branches)]


@partial(jit_resident, static_argnames=("grid", "guidance", "sites", "role"))
def _advance(
    model: MMDiT,
    latents: Array,
    text: Array,
    pooled: Array,
    sigma: Array,
    after: Array,
    negative: NegativeBranch | None,
    grid: tuple[int, int],
    guidance: float | None,
    sites: SiteSet,
    role: str,
) -> tuple[Array, dict[str, Any]]:
    """Returns the latents after a step, and by group what its sites report, [branch prompt site row d_model]."""
    counts = Tokens(img=grid[0] * grid[1], txt=text.shape[1])
    tokens = {group.name: jnp.arange(group.rows(counts)) for group, _ in sites.members}
    scale = None if guidance is None else jnp.asarray(guidance, latents.dtype)

    def one(z: Array, txt: Array, vec: Array) -> tuple[Array, dict[str, Any]]:
        def branch(number: Any, txt: Array, vec: Array) -> tuple[Array, dict[str, Any]]:
            del number  # the model sees the step through its time
            v, rows = tapped_velocity(model, Inputs(z, txt, vec, sigma, scale), tokens, grid=grid, sites=sites)
            return v, {name: (both.y if role == "sae" else both.x) for name, both in rows.items()}

        return step_velocity(branch, txt, vec, negative, 0, z.dtype)

    velocity, read = jax.vmap(one, out_axes=(0, 1))(latents, text, pooled)
    return latents + (after - sigma) * velocity, read
