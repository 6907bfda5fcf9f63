"""A converted pipeline beside the PyTorch one, block by block: `difffract convert check`.

1. PyTorch's text encoders read one prompt, its transformer runs once on that and on noise, its autoencoder decodes.
2. Each block of ours gets what PyTorch's block got, so that an error is that block's own and shows which one is wrong.
3. Last the whole transformer, from latents to velocity, where the errors of all blocks add up.

Both run in float32 on the processor, on a small image; the weights are the full ones. Errors are relative 2-norms.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters.configurations import is_diffusers_directory, pipeline_config
from converters.torch_files import (
    BlockRecord,
    TransformerInputs,
    TransformerRecord,
    record_decoding,
    record_text,
    record_transformer,
)
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.stacks import sequences, slice_layer, streams
from difffract_jax.models.tokenizers import encode_prompt

PROMPT = "a red fox at dawn, oil painting"
GRID = 4, 6
TEXT_TOKENS = 24
TIME = 0.75
GUIDANCE = 3.5
TOLERANCE = 1e-5
"""Of one block: float32 on both sides, every product rounded in another order."""
WHOLE = 10
"""How many times the tolerance of a block the whole transformer is allowed."""


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


def check(source: str | Path, pipe: Pipeline, *, tolerance: float = TOLERANCE) -> list[CheckRow]:
    """Compares a pipeline with the PyTorch one that it was converted from.

    Args:
        source: the PyTorch pipeline, a diffusers directory.
        pipe: ours, in float32.
        tolerance: largest relative error of a block.

    Returns:
        One row per text encoder, block, and whole.

    Raises:
        UserError: if `source` is not a diffusers directory, or of other shapes than the pipeline.
    """
    directory = Path(source)
    if not is_diffusers_directory(directory):
        raise UserError(f"{directory} is not a diffusers directory; give the one that the pipeline was converted from.")
    theirs = pipeline_config(directory)
    other = [
        name for name in ("transformer", "t5", "clip", "vae") if getattr(theirs, name) != getattr(pipe.config, name)
    ]
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


def _comparisons(directory: Path, pipe: Pipeline) -> Iterator[tuple[str, Any, Any, int]]:
    """Yields what is compared: its name, our result, PyTorch's, and how many tolerances it is allowed."""
    ids = encode_prompt(pipe.tokenizers, PROMPT, TEXT_TOKENS)
    text = record_text(directory, ids.t5_ids, ids.clip_ids)
    yield "t5", jax.jit(_call)(pipe.t5, ids.t5_ids), text.t5, 1
    yield "clip", jax.jit(_call)(pipe.clip, ids.clip_ids), (text.clip, text.pooled), 1
    rng = np.random.default_rng(0)
    channels = pipe.config.transformer.in_channels
    latents = rng.standard_normal((GRID[0] * GRID[1], channels)).astype(np.float32)
    guidance = GUIDANCE if pipe.config.transformer.guidance else None
    given = TransformerInputs(latents, text.t5, text.pooled, TIME, guidance, GRID)
    yield from _transformer(pipe.transformer, given, record_transformer(directory, given))
    latent = rng.standard_normal((2 * GRID[0], 2 * GRID[1], pipe.config.vae.latent_channels)).astype(np.float32)
    yield "autoencoder", jax.jit(lambda vae, z: vae.decode(z))(pipe.vae, latent), record_decoding(directory, latent), 1


def _call(module: Any, ids: Any) -> Any:
    return module(ids)


def _transformer(
    model: MMDiT, given: TransformerInputs, record: TransformerRecord
) -> Iterator[tuple[str, Any, Any, int]]:
    guidance = None if given.guidance is None else jnp.float32(given.guidance)
    latents, text, pooled = map(jnp.asarray, (given.latents, given.text, given.pooled))
    inputs = Inputs(latents, text, pooled, jnp.float32(given.t), guidance)
    h, cond = jax.jit(lambda model, inputs: model.embed(inputs, given.grid))(model, inputs)
    first = record.double[0]
    yield "embeddings", (h, cond.vec), (Streams(first.img, first.txt), first.cond), 1
    run = jax.jit(_block)
    for name, stack, blocks in (("double", model.double, record.double), ("single", model.single, record.single)):
        for number, block in enumerate(blocks):
            ours = run(stack, number, block, cond)
            yield f"{name} {number}", ours, Streams(block.img_out, block.txt_out), 1
    velocity = jax.jit(lambda model, inputs: model(inputs, given.grid))(model, inputs)
    yield "whole transformer", velocity, record.velocity, WHOLE


def _block(stack: Any, number: Any, given: BlockRecord, cond: Cond) -> Streams:
    h = Streams(jnp.asarray(given.img), jnp.asarray(given.txt))
    after, _ = slice_layer(stack, number)(sequences(h, stack.groups), cond._replace(vec=given.cond))
    return streams(after, stack.groups, h)
