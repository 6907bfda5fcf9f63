"""A model of your own, traced: a small robot whose transformer generates movements from spoken commands.

It shares no block with FLUX: one stack of one-stream blocks over the command's words and the movement's points, RMS
norms without shifts, attention before a squared-ReLU MLP, positions along one axis. docs/your-own-model.md says what
each piece must offer. In one or two minutes on a laptop this

1. teaches the model its 24 commands by flow matching,
2. trains transcoders on its MLPs, on the rows that its own sampler makes,
3. records a step, and checks that the replacement is the model there,
4. traces the strongest feature of the last block, and checks that edges and bias add up to it,
5. saves the transcoders, the graph, and the page that shows it.

    python examples/your_own_model.py [FOLDER]
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import difffract_jax as dfx
from difffract_jax.address import Group, Layout, Stack
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.models.autoencoder import AutoencoderConfig
from difffract_jax.models.blocks import BlockActs, Cond, FluxConfig, Streams, merge_heads, split_heads
from difffract_jax.models.mmdit import TIME_CHANNELS, Embedder, Final, Inputs, MMDiT, stack_of, time_channels
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.qwen3 import NoPooled, NoPooledConfig
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.tokenizers import PADDING, SPACE, TokenIds
from difffract_jax.ops import attend, rope_table, rotate
from difffract_jax.storage.checkpoint import tree_hash
from difffract_jax.transcoders.harvest import Sampler
from difffract_jax.transcoders.prompts import PromptWorld
from difffract_jax.transcoders.sites import parse_sites

VERBS, SIDES, MANNERS = ("reach", "grab", "wave"), ("left", "right", "up", "down"), ("slowly", "quickly")
WORDS = (PADDING, *VERBS, *SIDES, *MANNERS)
COMMANDS = tuple(map(" ".join, product(VERBS, SIDES, MANNERS)))
POINTS, CHANNELS, COMMAND_TOKENS = 8, 4, 4  # a movement: place across, place up, grip, speed at eight moments


# ---- the model: blocks, and what stands around them
class Held(NamedTuple):
    """What a frozen block takes from a record: queries, keys and the scales of both norms."""

    q: Any
    k: Any
    scale1: Any
    scale2: Any


EXPERT = Group("expert", "expert", ("txt", "img"))  # the MLPs' site: its sequence holds the words, then the points


class ExpertBlock(nnx.Module):
    """One block: attention, then an MLP, each behind an RMS norm and in front of a gate that time sets."""

    groups: ClassVar[tuple[Group, ...]] = (EXPERT,)
    attention_order: ClassVar[tuple[int, ...]] = (0,)

    def __init__(self, config: "ExpertConfig", *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        linear, width = partial(nnx.Linear, use_bias=False, param_dtype=dtype, rngs=rngs), config.d_model
        self.time = linear(width, 4 * width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, config.d_ff), linear(config.d_ff, width)
        self.head_dim = config.head_dim

    def __call__(self, h, cond, *, frozen=None, mlp=None, heads=None, scores=None):
        """Runs the block, live or from a record, with its own MLP or what stands in for it."""
        middle, x, held = self._before_mlp(h[0], cond, frozen, heads, scores)
        y = self.run_mlp(0, x) if mlp is None else mlp(0, x)
        after = middle + self._times(cond)[3] * y
        return (after,), BlockActs(held, (x,), (y,), (after,))

    def run_mlp(self, group, x):
        """The MLP itself."""
        return self.down(jnp.square(jax.nn.relu(self.up(x))))

    def gates(self, cond, frozen=None):
        """The factor between the MLP's output and the residual stream."""
        return (self._times(cond)[3][0],)

    def entry(self, cond, frozen):
        """Pulls gradients at single rows of the MLP's input back to the stream that enters the block."""

        def enter(gradients, group, row):
            rows = jnp.zeros((len(gradients), *frozen.scale1.shape, gradients.shape[1]), gradients.dtype)
            rows = rows.at[jnp.arange(len(row)), row].set(gradients, mode="drop")
            _, pull = jax.vjp(lambda h: self._before_mlp(h, cond, frozen)[1], jnp.zeros_like(rows[0]))
            return (jax.vmap(lambda one: pull(one)[0])(rows),)

        return enter

    @staticmethod
    def attention_shape(frozen):
        """Queries, heads and columns of a head; a block without attention returns None, and needs nothing below."""
        return frozen.q.shape[-3:]

    @staticmethod
    def queries_and_keys(frozen):
        """What the pattern is made of."""
        return frozen.q, frozen.k

    @staticmethod
    def with_queries(frozen, factor):
        """A record with its queries multiplied."""
        return frozen._replace(q=factor * frozen.q)

    def query_or_key(self, cond, frozen, part, head, group, row, h, denominator):
        """One head's query or key of a row; there is no norm of queries and keys, so that none is held."""
        m = h * frozen.scale1[row] * self._times(cond)[0][0]
        raw = split_heads(self.qkv(m[None])[:, part * h.size : (part + 1) * h.size], self.head_dim)[:, head]
        return rotate(raw[:, None], cond.cos[row][None], cond.sin[row][None])[0, 0], jnp.ones((), h.dtype)

    def _before_mlp(self, h, cond, frozen, heads=None, scores=None):
        """The residual stream after attention, the MLP's input, and what was used: affine in h from a record."""
        scale1, gate1, scale2, _ = self._times(cond)
        m, held1 = rms_norm(h, None if frozen is None else frozen.scale1)
        q, k, v = (split_heads(part, self.head_dim) for part in jnp.split(self.qkv(m * scale1), 3, axis=1))
        q, k = (rotate(one, cond.cos, cond.sin) for one in (q, k)) if frozen is None else (frozen.q, frozen.k)
        precision = None if frozen is None else "highest"  # a recorded pattern stays what it was
        mixed = attend(q, k, v, scale=self.head_dim**-0.5, bias=scores, precision=precision)
        mixed = mixed if heads is None else mixed * heads[None, :, None]
        h = h + gate1 * self.out(merge_heads(mixed))
        x, held2 = rms_norm(h, None if frozen is None else frozen.scale2)
        return h, x * scale2, Held(q, k, held1, held2)

    def _times(self, cond):
        scale1, gate1, scale2, gate2 = self.time(jax.nn.silu(cond.vec)).reshape(4, 1, -1)
        return 1 + scale1, 1 + gate1, 1 + scale2, 1 + gate2


def rms_norm(h, held):
    """Normalises rows, by a recorded scale if there is one; returns the scale too."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=1) + 1e-6) if held is None else held
    return h * scale[:, None], scale


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(FluxConfig):
    """The model's shape: `layout` names its one stack."""

    depth: int = 3
    depth_double: int = 0
    depth_single: int = 0
    heads: int = 4
    head_dim: int = 8
    rope_axes: tuple[int, ...] = (8,)
    in_channels: int = CHANNELS
    out_channels: int = CHANNELS
    text_width: int = 16
    pooled_width: int = 0
    guidance: bool = False

    @property
    def layout(self) -> Layout:
        """The stacks, in order."""
        return Layout((Stack("expert", self.depth, (EXPERT,)),))


class Expert(MMDiT):
    """The transformer: `img_in`, `txt_in`, `embed`, a stack by the name that the layout has for it, `final`."""

    def __init__(self, config: ExpertConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.img_in = nnx.Linear(config.in_channels, config.d_model, param_dtype=dtype, rngs=rngs)
        self.txt_in = nnx.Linear(config.text_width, config.d_model, param_dtype=dtype, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, config.d_model, rngs=rngs, dtype=dtype)
        self.expert = stack_of(ExpertBlock, config, config.depth, rngs, dtype)
        self.final = Final(config, rngs=rngs, dtype=dtype)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the streams that enter the first block, and what blocks share."""
        dtype = self.img_in.kernel.dtype
        streams = Streams(self.img_in(inputs.latents.astype(dtype)), self.txt_in(inputs.text.astype(dtype)))
        places = np.arange(len(streams.txt) + len(streams.img), dtype=np.float64)[:, None]
        cos, sin = (jnp.asarray(one, dtype) for one in rope_table(places, self.config.rope_axes, 100.0))
        return streams, Cond(self.time_in(time_channels(inputs.t, dtype)), cos, sin)


# ---- the pipeline around it: words to ids, ids to vectors
class Reader:
    """What stands for tokenizers: one token a word."""

    def encode(self, prompt: str, text_tokens: int) -> TokenIds:
        """Returns a command's ids, padded, and which are its own."""
        numbers = [WORDS.index(word) for word in prompt.split()][:text_tokens]
        ids = np.array(numbers + [0] * (text_tokens - len(numbers)), np.int32)
        return TokenIds(ids, ids > 0, np.zeros(0, np.int32), " ".join(prompt.split()[text_tokens:]))

    def pieces(self, ids: Any) -> list[str]:
        """Returns words as graphs write them: one that begins a word has a space before it."""
        return [PADDING if one == 0 else SPACE + WORDS[one] for one in ids]


class WordTable(nnx.Module):
    """What stands for the text encoder: a vector a word."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (len(WORDS), width)))

    def __call__(self, ids: Any) -> Any:
        """Returns the vectors of some ids."""
        return self.table[...][ids]


def make_pipeline(model: Expert, encoder: WordTable) -> Pipeline:
    """Puts the pieces together; there is nothing pooled and no autoencoder: a unit of 2 pixels is a point."""
    options = {"layers_per_block": 1, "norm_groups": 1, "scaling_factor": 1.0, "shift_factor": 0.0}
    pixels = AutoencoderConfig(latent_channels=1, widths=(1,), **options)
    run = GenerationDefaults(height=2, width=2 * POINTS, text_tokens=COMMAND_TOKENS, steps=4, guidance=0.0)
    config = PipelineConfig(model.config, None, NoPooledConfig(), pixels, SchedulerConfig(), run)
    source = tree_hash({"transformer": model, "t5": encoder})  # graphs and embeddings know the model by it
    return Pipeline(model, encoder, NoPooled(NoPooledConfig(), rngs=nnx.Rngs(0)), None, Reader(), config, source)


# ---- its world, and how it learns it
def movement(command: str) -> np.ndarray:
    """Returns the movement that a command means, [point channel]."""
    verb, side, manner = command.split()
    across, up = {"left": (-1, 0), "right": (1, 0), "up": (0, 1), "down": (0, -1)}[side]
    path = np.linspace(0, 1, POINTS) ** (1 if manner == "slowly" else 0.4)
    sway = 0.6 * np.sin(3 * np.pi * path) if verb == "wave" else 0 * path
    grip = np.where(path > 0.7, 1.0, -1.0) if verb == "grab" else -np.ones(POINTS)
    speed = np.full(POINTS, -1.0 if manner == "slowly" else 1.0)
    return np.stack([across * path + up * sway, up * path + across * sway, grip, speed], axis=1).astype(np.float32)


def teach(model: Expert, encoder: WordTable, steps: int, batch: int = 48) -> tuple[Expert, float]:
    """Trains the model by flow matching; returns it and the last loss, per number."""
    reader = Reader()
    texts = jnp.stack([encoder(reader.encode(command, COMMAND_TOKENS).t5_ids) for command in COMMANDS])
    clean, optimiser = jnp.stack([*map(movement, COMMANDS)]), optax.adam(3e-3)

    def loss_of(model: Expert, key: Any) -> Any:
        which, when, what = jax.random.split(key, 3)
        rows, t = jax.random.randint(which, (batch,), 0, len(COMMANDS)), jax.random.uniform(when, (batch,))
        noise = jax.random.normal(what, (batch, POINTS, CHANNELS))
        mixed = (1 - t)[:, None, None] * clean[rows] + t[:, None, None] * noise
        velocity = jax.vmap(lambda z, text, t: model(Inputs(z, text, jnp.zeros(0), t), (1, POINTS)))
        return jnp.mean(jnp.square(velocity(mixed, texts[rows], t) - (noise - clean[rows])))

    @jax.jit
    def run(model: Expert) -> tuple[Expert, Any]:
        def step(carry: Any, key: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(carry[0], key)
            updates, state = optimiser.update(gradients, carry[1])
            return (optax.apply_updates(carry[0], updates), state), loss

        keys = jax.random.split(jax.random.key(1), steps)
        (model, _), losses = jax.lax.scan(step, (model, optimiser.init(model)), keys)
        return model, losses[-20:].mean()

    trained, loss = run(model)
    return trained, float(loss)


def train_transcoders(pipe: Pipeline, out: Path, **choices: Any) -> Any:
    """Trains a transcoder for every MLP on what the sampler makes of the model's own commands."""
    sites = parse_sites(("*/*",), pipe.config.transformer.layout)
    prompts = PromptWorld(lambda number: COMMANDS[number % len(COMMANDS)], "train", 0.05)
    sampler = Sampler(pipe, sites, pipe.plan(), prompts, seed=0, prompts_at_once=len(COMMANDS))
    return dfx.transcoders.train(source=sampler, out=out, **choices).transcoders


def main(folder: Path, *, lessons: int = 800, **choices: Any) -> tuple[Pipeline, Any, dfx.Graph]:
    """Does all of it in a folder; returns the pipeline, the transcoders and the graph."""
    rngs, config = nnx.Rngs(0), ExpertConfig()
    encoder = WordTable(config.text_width, rngs=rngs)
    model, loss = teach(Expert(config, rngs=rngs), encoder, lessons)
    pipe = make_pipeline(model, encoder)
    print(f"taught {len(COMMANDS)} commands: loss {loss:.3f}")

    settings = {"steps": 300, "batch": 256, "expansion": 8, "k": 8, "buffer_rows": 4096} | choices
    tcs = train_transcoders(pipe, folder / "run", **settings)
    dfx.save_transcoders(tcs, folder / "transcoders", overwrite=True)
    trace = dfx.capture(pipe, tcs, "grab left quickly", step=2, output=True)
    replaced = run_replacement(*prepare_step(trace, tcs)).velocity
    print(f"the replacement misses the model's velocity by {np.max(np.abs(replaced - trace.record.velocity)):.1e}")
    target = dfx.strongest_feature(trace, tcs, "expert", config.depth - 1)
    graph = dfx.attribute(trace, tcs, target=target, max_nodes=30)
    print(graph)
    print(f"edges and bias miss the target by {graph.largest_conservation_error:.1e} of the edges' sum")
    graph.save(folder / "robot.npz")
    graph.show().save(folder / "robot.html")
    return pipe, tcs, graph


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "robot"))
