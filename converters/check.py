"""A converted pipeline beside the PyTorch one, block by block: `difffract convert check`.

1. PyTorch's text encoders read one prompt, its transformer runs once on that and on noise, its autoencoder decodes.
2. Each block of ours gets what PyTorch's block got, so that an error is that block's own and shows which one is wrong.
3. Last the whole transformer, from latents to velocity, where the errors of all blocks add up.

Both run in float32 on the processor, on a small image; the weights are the full ones, of which one block's are in
memory at a time on either side. Errors are relative 2-norms.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters.configurations import is_diffusers_directory, pipeline_config
from converters.pipelines import Opened, abstract_module, sliced, stacks_of
from converters.torch_files import (
    TransformerInputs,
    TransformerRecord,
    record_decoding,
    record_text,
    record_transformer,
)
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.stacks import sequences, streams
from difffract_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.streaming import Leaf

PROMPT = "a red fox at dawn, oil painting"
GRID = 4, 6
TEXT_TOKENS = 24
TIME = 0.75
GUIDANCE = 3.5
TOLERANCE = 1e-5
"""Of one block: float32 on both sides, every product rounded in another order."""
WHOLE = 10
"""How many times the tolerance of a block the whole transformer is allowed."""

Comparisons = Iterator[tuple[str, Any, Any, int]]
"""What is compared: its name, our result, PyTorch's, and how many tolerances it is allowed."""


class CheckRow(NamedTuple):
    """One comparison.

    Attributes:
        part: what was compared.
        error: 2-norm of the difference over the 2-norm of PyTorch's result.
        bar: largest error that counts as equal.
        equal: whether the error keeps to it.
    """

    part: str
    error: float
    bar: float
    equal: bool


class _Part:
    """One part of ours: what is outside its stacks, and one layer of a stack at a time, in float32."""

    def __init__(self, module: Any, config: Any, leaves: Mapping[str, Leaf]):
        self._abstract, self._leaves, self._stacks = abstract_module(module, config), leaves, stacks_of(config)

    def layer(self, stack: str, number: int) -> Any:
        """Returns one block."""
        shapes = getattr(self._abstract, stack)
        arrays = [_wide(self._leaves[f"{stack}.{path}"].make(number)) for path in leaf_paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), arrays)

    def outside(self) -> Any:
        """Returns the module; its stacks hold nothing."""
        within = tuple(f"{stack}." for stack in self._stacks)
        nothing = np.zeros(0, np.float32)
        return self._made(lambda path: nothing if path.startswith(within) else self._array(path))

    def whole(self) -> Any:
        """Returns the module with all of its weights."""
        return self._made(self._array)

    def _array(self, path: str) -> jax.Array:
        return _wide(self._leaves[path].array())

    def _made(self, array: Callable[[str], Any]) -> Any:
        paths = leaf_paths(self._abstract)
        return jax.tree.unflatten(jax.tree.structure(self._abstract), [array(path) for path in paths])


def _wide(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.float32, copy=False))


def check(source: str | Path, pipe: Pipeline | Opened, *, tolerance: float = TOLERANCE) -> list[CheckRow]:
    """Compares a pipeline with the PyTorch one that it was converted from.

    Args:
        source: the PyTorch pipeline, a diffusers directory.
        pipe: ours, in memory, or opened.
        tolerance: largest relative error of a block.

    Returns:
        One row per text encoder, block, and whole.

    Raises:
        UserError: if `source` is not a diffusers directory, or of other shapes than the pipeline.
    """
    directory = Path(source)
    if not is_diffusers_directory(directory):
        raise UserError(f"{directory} is not a diffusers directory; give the one that the pipeline was converted from.")
    names = ("transformer", "t5", "clip", "vae")
    if isinstance(pipe, Pipeline):
        parts = {name: sliced(getattr(pipe.config, name), leaf_paths(getattr(pipe, name))) for name in names}
        pipe = Opened(parts, pipe.config, pipe.tokenizers, ())
    theirs = pipeline_config(directory)
    other = [name for name in names if getattr(theirs, name) != getattr(pipe.config, name)]
    if other:
        raise UserError(f"{directory} and the converted pipeline have different shapes in: {', '.join(other)}.")
    rows = []
    with jax.default_matmul_precision("highest"):
        for part, ours, expected, factor in _comparisons(directory, pipe):
            error = _relative_error(ours, expected)
            rows.append(CheckRow(part, error, factor * tolerance, error <= factor * tolerance))
    return rows


def _relative_error(ours: Any, expected: Any) -> float:
    ours, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(pair)]) for pair in (ours, expected))
    difference = ours.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def _comparisons(directory: Path, opened: Opened) -> Comparisons:
    """Compares every part."""
    config: Any = opened.config
    modules = {"transformer": MMDiT, "t5": T5Encoder, "clip": CLIPTextEncoder, "vae": Autoencoder}
    parts = {name: _Part(module, getattr(config, name), opened.parts[name]) for name, module in modules.items()}
    ids = encode_prompt(opened.tokenizers, PROMPT, TEXT_TOKENS)
    text = record_text(directory, ids.t5_ids, ids.clip_ids)
    yield "t5", _t5(parts["t5"], config.t5, ids.t5_ids), text.t5, 1
    yield "clip", jax.jit(_call)(parts["clip"].whole(), ids.clip_ids), (text.clip, text.pooled), 1
    rng = np.random.default_rng(0)
    channels = config.transformer.in_channels
    latents = rng.standard_normal((GRID[0] * GRID[1], channels)).astype(np.float32)
    guidance = GUIDANCE if config.transformer.guidance else None
    given = TransformerInputs(latents, text.t5, text.pooled, TIME, guidance, GRID)
    yield from _transformer(parts["transformer"], given, record_transformer(directory, given))
    latent = rng.standard_normal((2 * GRID[0], 2 * GRID[1], config.vae.latent_channels)).astype(np.float32)
    decoded = jax.jit(lambda vae, z: vae.decode(z))(parts["vae"].whole(), latent)
    yield "autoencoder", decoded, record_decoding(directory, latent), 1


def _call(module: Any, *arguments: Any) -> Any:
    return module(*arguments)


def _t5(part: _Part, config: T5Config, ids: np.ndarray) -> jax.Array:
    """Runs T5, block by block."""
    model = part.outside()
    buckets = relative_buckets(len(ids), config.buckets, config.max_distance)
    bias = jnp.moveaxis(model.relative_bias.embedding[...][buckets], -1, 0)
    x, run = jnp.take(model.embed.embedding[...], jnp.asarray(ids), axis=0), jax.jit(_call)
    for number in range(config.layers):
        x = run(part.layer("blocks", number), x, bias)
    return run(model.final_norm, x)


def _transformer(part: _Part, given: TransformerInputs, record: TransformerRecord) -> Comparisons:
    guidance = None if given.guidance is None else jnp.float32(given.guidance)
    latents, text, pooled = map(jnp.asarray, (given.latents, given.text, given.pooled))
    inputs = Inputs(latents, text, pooled, jnp.float32(given.t), guidance)
    model = part.outside()
    h, cond = jax.jit(lambda model, inputs: model.embed(inputs, given.grid))(model, inputs)
    first = record.double[0]
    yield "embeddings", (h, cond.vec), (Streams(first.img, first.txt), first.cond), 1
    run = jax.jit(_block)
    for name, blocks in (("double", record.double), ("single", record.single)):
        for number, block in enumerate(blocks):
            layer = part.layer(name, number)
            theirs = Streams(jnp.asarray(block.img), jnp.asarray(block.txt))
            ours = run(layer, theirs, cond._replace(vec=jnp.asarray(block.cond)))
            yield f"{name} {number}", ours, Streams(block.img_out, block.txt_out), 1
            h = run(layer, h, cond)
            del layer  # before the next is made
    yield "whole transformer", jax.jit(_call)(model.final, h.img, cond), record.velocity, WHOLE


def _block(block: Any, h: Streams, cond: Cond) -> Streams:
    after, _ = block(sequences(h, block.groups), cond)
    return streams(after, block.groups, h)
