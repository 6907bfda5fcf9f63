"""A converted pipeline beside the PyTorch one, block by block: `difffract convert check`.

1. PyTorch's text encoders read one prompt, its transformer runs once on that and on noise, its autoencoder decodes.
2. Each block of ours gets what PyTorch's block got, so that an error is that block's own and shows which one is wrong.
3. Last the whole transformer, from latents to velocity, where the errors of all blocks add up.

Both run in float32 on the processor, on a small image; the weights are the full ones, of which one block's are in
memory at a time on either side. Errors are relative 2-norms.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters.configurations import is_diffusers_directory, pipeline_config
from converters.kinds import tables_of
from converters.pipeline_kind import ModelCheck
from converters.pipelines import Opened, abstract_module, sliced, stacks_of
from converters.torch_files import (
    BlockRecord,
    TransformerInputs,
    TransformerRecord,
    record_decoding,
    record_transformer,
)
from converters.torch_sd3 import record_sd3
from converters.torch_text import record_encoders, record_states, record_text
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Cond, FluxConfig, Streams
from difffract_jax.models.families import PARTS, module_of
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.qwen3 import Qwen3Config
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.sd3_text import TwoClipsConfig
from difffract_jax.models.stacks import sequences, streams
from difffract_jax.models.streaming import with_sources
from difffract_jax.models.t5 import T5Config, relative_buckets
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.streaming import Leaf

PROMPT = "a red fox at dawn, oil painting"
PADDED_PROMPT = "a red fox"
"""Of a model that hides padding: short, so that there is some whatever the tokenizer."""
GRID = 4, 8
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

    def streamed(self) -> Any:
        """Returns the module, whose blocks are made when they are run."""
        source = _Layers(self)
        made = with_sources(self._abstract, {name: source for name in self._abstract.layered}, "disk")
        leaves = [self._array(path) for path in leaf_paths(made)]
        return jax.tree.unflatten(jax.tree.structure(made), leaves)

    def whole(self) -> Any:
        """Returns the module with all of its weights."""
        return self._made(self._array)

    def _array(self, path: str) -> jax.Array:
        return _wide(self._leaves[path].array())

    def _made(self, array: Callable[[str], Any]) -> Any:
        paths = leaf_paths(self._abstract)
        return jax.tree.unflatten(jax.tree.structure(self._abstract), [array(path) for path in paths])


class _Layers:
    """The blocks of a part that has one stack of them; a `models.streaming.LayerSource`."""

    def __init__(self, part: _Part) -> None:
        self._part = part
        (self._stack,) = part._abstract.layered
        self.depth = jax.tree.leaves(getattr(part._abstract, self._stack))[0].shape[0]

    def read(self, layer: int, take: Any = None) -> Any:
        """Returns one block."""
        del take  # all is wanted
        return jax.tree.map(np.asarray, self._part.layer(self._stack, layer))

    def abstract(self) -> Any:
        """Returns the shapes and types of a block."""
        stack = getattr(self._part._abstract, self._stack)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)


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
    shapes = {name: getattr(config, name) for name in PARTS}
    parts = {name: _Part(module_of(shape), shape, opened.parts[name]) for name, shape in shapes.items()}
    states, pooled = yield from _text_encoders(directory, opened, parts)
    rng = np.random.default_rng(0)
    channels = config.transformer.in_channels
    latents = rng.standard_normal((GRID[0] * GRID[1], channels)).astype(np.float32)
    guidance = GUIDANCE if config.transformer.guidance else None
    given = TransformerInputs(latents, states, pooled, TIME, guidance, GRID)
    record = _recorder(config.transformer)(directory, given)
    yield from _transformer(parts["transformer"], config.transformer, given, record)
    latent = rng.standard_normal((2 * GRID[0], 2 * GRID[1], config.vae.latent_channels)).astype(np.float32)
    decoded = jax.jit(lambda vae, z: vae.decode(z))(parts["vae"].whole(), latent)
    yield "autoencoder", decoded, record_decoding(directory, latent), 1


def _recorder(config: FluxConfig) -> Callable[[Path, TransformerInputs], TransformerRecord]:
    """Returns what runs PyTorch's transformer."""
    if isinstance(config, Sd3Config):
        return record_sd3
    model_check = _check_of(config)
    return record_transformer if model_check is None else model_check.record


def _check_of(config: FluxConfig) -> ModelCheck | None:
    """Returns how a model of a kind with `PipelineKind.tables` is compared; None for others."""
    tables = tables_of(config)
    return None if tables is None else tables.check


def _words(config: FluxConfig) -> int:
    """Returns the length of the text: a multiple of the model's unit."""
    return -(-TEXT_TOKENS // config.text_unit) * config.text_unit


def _text_encoders(
    directory: Path, opened: Opened, parts: Mapping[str, _Part]
) -> Generator[tuple[str, Any, Any, int], None, tuple[np.ndarray, np.ndarray]]:
    """Compares the text encoders; returns the text and the pooled embedding that PyTorch's give the transformer."""
    config: Any = opened.config
    if isinstance(config.clip, TwoClipsConfig):
        return (yield from _two_clips(directory, opened, parts))
    model_check = _check_of(config.transformer)
    if model_check is not None:
        ids = encode_prompt(opened.tokenizers, PADDED_PROMPT, _words(config.transformer))
        states = model_check.text(directory, ids, config)
        yield model_check.encoder, parts["t5"].streamed()(ids.t5_ids), states, model_check.tolerances
        return states, np.zeros(0, np.float32)
    ids = encode_prompt(opened.tokenizers, PROMPT, TEXT_TOKENS)
    if isinstance(config.t5, Qwen3Config):
        states = record_states(directory, ids.t5_ids, ids.t5_mask, config.t5.read_layers)
        # The states that are read lie behind 9, 18 and 27 layers, whose errors add up.
        yield "qwen3", parts["t5"].streamed()(ids.t5_ids), states, WHOLE
        return states, np.zeros(0, np.float32)
    text = record_text(directory, ids.t5_ids, ids.clip_ids)
    yield "t5", _t5(parts["t5"], config.t5, ids.t5_ids), text.t5, 1
    yield "clip", jax.jit(_call)(parts["clip"].whole(), ids.clip_ids), (text.clip, text.pooled), 1
    return text.t5, text.pooled


def _two_clips(
    directory: Path, opened: Opened, parts: Mapping[str, _Part]
) -> Generator[tuple[str, Any, Any, int], None, tuple[np.ndarray, np.ndarray]]:
    """Compares the text encoders of Stable Diffusion 3, as `_text_encoders`."""
    config: Any = opened.config
    length = config.clip.states
    ids = encode_prompt(opened.tokenizers, PROMPT, length + TEXT_TOKENS)
    text = record_encoders(directory, ids.clip_ids, ids.t5_ids[length:])
    t5 = np.zeros((TEXT_TOKENS, config.t5.d_model), np.float32) if text.t5 is None else text.t5
    if text.t5 is not None:
        yield "t5", _t5(parts["t5"], config.t5, ids.t5_ids[length:]), t5, 1
    clips = parts["clip"].whole()
    for name, one, own, theirs in zip(
        ("clip", "clip 2"), (clips.first, clips.second), np.split(ids.clip_ids, 2), text.clips, strict=True
    ):
        yield name, jax.jit(_call)(one, jnp.asarray(own)), theirs, 1
    states, pooled = (np.concatenate(column, axis=-1) for column in zip(*text.clips, strict=True))
    return np.concatenate([np.pad(states, ((0, 0), (0, t5.shape[1] - states.shape[1]))), t5]), pooled


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


def _transformer(part: _Part, config: FluxConfig, given: TransformerInputs, record: TransformerRecord) -> Comparisons:
    guidance = None if given.guidance is None else jnp.float32(given.guidance)
    latents, text, pooled = map(jnp.asarray, (given.latents, given.text, given.pooled))
    inputs = Inputs(latents, text, pooled, jnp.float32(given.t), guidance)
    model = part.outside()
    h, cond = jax.jit(lambda model, inputs: model.embed(inputs, given.grid))(model, inputs)
    first = record.blocks[0]
    # Of tokens that attention does not see the text has zeros, and what becomes of them is of no matter.
    model_check = _check_of(config)
    seen = slice(None) if model_check is None else np.any(given.text != 0, axis=-1)
    own, theirs = _conditions(cond, record) if model_check is None else model_check.conditions(cond, record)
    with_theirs = _given_theirs if model_check is None else model_check.given
    yield "embeddings", (_seen(h, seen), own), (_seen(Streams(first.img, first.txt), seen), theirs), 1
    run = jax.jit(_block)
    places = [(stack.name, number) for stack in config.layout.stacks for number in range(stack.depth)]
    for (name, number), block in zip(places, record.blocks, strict=True):
        layer = part.layer(name, number)
        entering = Streams(jnp.asarray(block.img), jnp.asarray(block.txt))
        ours = run(layer, entering, with_theirs(cond, record, block))
        yield f"{name} {number}", _seen(ours, seen), _seen(Streams(block.img_out, block.txt_out), seen), 1
        h = run(layer, h, cond)
        del layer  # before the next is made
    yield "whole transformer", jax.jit(_call)(model.final, h.img, cond), record.velocity, WHOLE


def _conditions(cond: Cond, record: TransformerRecord) -> tuple[Any, Any]:
    """Returns what conditions the blocks, ours and PyTorch's: a vector, or the modulations."""
    first = record.blocks[0].cond
    if cond.mod is None:
        return cond.vec, first
    return np.concatenate([np.ravel(one) for one in cond.mod.double]), first  # of all double-stream blocks


def _given_theirs(cond: Cond, record: TransformerRecord, block: BlockRecord) -> Cond:
    """Returns what conditions a block, with PyTorch's vector where blocks make their modulations of it."""
    del record  # of the whole run
    return cond._replace(vec=jnp.asarray(block.cond)) if cond.mod is None else cond


def _seen(h: Streams, seen: Any) -> Streams:
    """Returns streams with the text tokens that attention sees."""
    return h._replace(txt=h.txt[seen])


def _block(block: Any, h: Streams, cond: Cond) -> Streams:
    after, _ = block(sequences(h, block.groups), cond)
    return streams(after, block.groups, h)
