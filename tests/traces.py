"""Traces to test on: the golden pipeline's, and small random ones in float64."""

import json
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from converters.torch_files import torch_noise
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.frozen.replacement import Replacement, prepare_step
from difffract_jax.circuits.trace.capture import Trace, capture
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.sampler import pack
from difffract_jax.models.shapes import abstract_stack
from difffract_jax.models.tiny import TINY, random_pipeline, random_weights
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet
from tolerances import REFERENCE, TOL

PROMPTS = (
    "a red fox at dawn, oil painting",
    "lighthouse and a tin robot in heavy fog, pixel art, emerald green",
)
SIZE = {"height": 96, "width": 96, "text_tokens": 16}
DEV = replace(TINY, guidance=True)
"""Shape of a small transformer that takes a guidance scale, as FLUX.1-dev does."""
IMAGE, TEXT, JOINT = range(3)
"""Numbers of FLUX's groups of sites."""


class Golden(NamedTuple):
    """The reference's pipeline and transcoders, and how to capture one of its traces."""

    pipe: Pipeline
    tcs: TranscoderSet
    forward: dict[str, np.ndarray]

    def trace(self, prompt: int, step: int, latents: np.ndarray | None = None, **more) -> Trace:
        """Captures as the reference did, padding included; seed 7 unless other starting noise is given."""
        latents = self.forward[f"p{prompt}_initial_latents"] if latents is None else latents
        return capture(
            self.pipe,
            self.tcs,
            PROMPTS[prompt],
            step=step,
            latents=latents,
            run=self.pipe.plan(**SIZE),
            **{"include_padding": True} | more,
        )


def golden_trace(golden: Golden, number: int) -> tuple[Trace, dict]:
    """Returns the trace of a golden graph and its target; starting noise is PyTorch's, as the reference drew it."""
    target = json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())["target"]
    noise = pack(torch_noise(target["seed"], 4, 12, 12)[0].transpose(1, 2, 0))
    return golden.trace(target["prompt_index"], target["step"], np.asarray(noise)), target


def guided_pipeline(dtype: DTypeLike = jnp.float32) -> Pipeline:
    """A small pipeline whose guidance is by two branches, as that of FLUX.2-klein's base model."""
    pipe = random_pipeline(seed=3, dtype=dtype)
    return pipe._replace(config=replace(pipe.config, defaults=replace(pipe.config.defaults, two_branches=True)))


def make_transcoders(
    config, *, img=(0, 1, 2), txt=(0, 1, 2), joint=(), conditioning="film", seed=0, dtype=jnp.float64, **shape
) -> TranscoderSet:
    """Random transcoders in which no weight is trivial; about a sixth of the features are active."""
    shape = TranscoderConfig(
        d_model=config.d_model,
        time_embed=0 if conditioning == "none" else 8,
        conditioning=conditioning,
        **{"features": 40} | shape,
    )
    chosen = sites_of({"img": img, "txt": txt, "joint": joint})
    stacks = {}
    for number, (name, layers) in enumerate((("img", img), ("txt", txt), ("joint", joint))):
        stack = random_weights(abstract_stack(Transcoder, shape, max(len(layers), 1), dtype), 3 * seed + number)
        stack.enc.bias[...] = stack.enc.bias[...] - 1
        if shape.activation == "jumprelu":
            stack.threshold[...] = 0.2 + jnp.abs(stack.threshold[...])
        if layers:
            stacks[name] = stack
    return TranscoderSet(stacks, chosen, shape, f"made:{seed}")


def with_joint(tcs: TranscoderSet, layers=(0, 1)) -> TranscoderSet:
    """The set with the image stream's transcoders in single-stream blocks too."""
    chosen = sites_of(tcs.sites.groups | {"joint": layers})
    return tcs._replace(stacks=tcs.stacks | {"joint": tcs.stacks["img"]}, sites=chosen)


class Exact(NamedTuple):
    """A small trace with its replacement, in float64 unless a test asks for float32."""

    pipe: Pipeline
    tcs: TranscoderSet
    trace: Trace
    replacement: Replacement


@cache
def make_exact(
    seed=0,
    prompt="a red circle",
    text_tokens=16,
    include_padding=False,
    output=False,
    dtype=jnp.float64,
    guidance=False,
    **transcoders,
) -> Exact:
    """Captures step 1 of a random pipeline, with `guidance` one of FLUX.1-dev's kind, once for all tests; float64 is to
    be made under the `x64` fixture."""
    pipe = random_pipeline(seed=seed, dtype=dtype, transformer=DEV if guidance else TINY)
    tcs = make_transcoders(pipe.config.transformer, seed=seed, dtype=dtype, **transcoders)
    trace = capture(
        pipe,
        tcs,
        prompt,
        seed=seed,
        step=1,
        include_padding=include_padding,
        output=output,
        run=pipe.plan(height=24, width=32, text_tokens=text_tokens),
    )
    return Exact(pipe, tcs, trace, prepare_step(trace, tcs))


EXPLAINED = {"seed": 5, "img": (0, 2), "txt": (0, 1, 2), "joint": (0, 1), "skip": True, "output": True}
"""Of `make_exact`: what attention and the pooled path are explained of, with a gap, a skip, all groups, an output."""
VARIANTS = {
    "padding replaced, a gap, guidance, through to the velocity": {
        "include_padding": True,
        "guidance": True,
        "img": (0, 2),
        "txt": (1,),
        "joint": (1,),
        "output": True,
    },
    "the largest few, no time, no text": {
        "activation": "topk",
        "k": 5,
        "skip": True,
        "conditioning": "none",
        "txt": (),
    },
    "a threshold, raw time, single-stream sites alone": {
        "activation": "jumprelu",
        "conditioning": "film_raw_t",
        "img": (),
        "txt": (),
        "joint": (1,),
    },
}
"""What is replaced, and how: together these hold every way there is."""
MORE_VARIANTS = {
    "every site": {},
    "guidance": {"guidance": True},
    "a skip": {"skip": True},
    "a gap": {"img": (0, 2), "txt": (0, 2)},
    "no image": {"img": (), "txt": (0, 1, 2)},
    "single-stream sites": {"joint": (0, 1), "skip": True},
}
"""With the slow tests: where a law fails, simpler ones that tell which way breaks it."""


def variant(name: str) -> Exact:
    """Makes one of the variants, as `make_exact` does."""
    return make_exact(seed=len(name), **(VARIANTS | MORE_VARIANTS)[name])


def same_graph(ours, expected, tolerance):
    """The same nodes, and edges that differ by at most `tolerance` of the largest."""
    for name in ("kind", "step", "stream", "block", "position", "feature"):
        assert np.array_equal(getattr(ours, f"node_{name}"), getattr(expected, f"node_{name}")), name
    assert np.array_equal(ours.edge_source, expected.edge_source)
    assert np.array_equal(ours.edge_target, expected.edge_target)
    error = np.abs(ours.edge_attribution - expected.edge_attribution).max() / np.abs(expected.edge_attribution).max()
    assert error <= tolerance, error


SAME_EDGES = 1e-6
"""Of the largest edge: float32 sums in another order, since streamed blocks are programs of their own."""


def same_edges(theirs, ours):
    """The same edges, whatever the order, but for those next to the threshold."""

    def edges(graph):
        columns = ("kind", "step", "stream", "block", "position", "feature")
        names = list(zip(*(getattr(graph, f"node_{column}").tolist() for column in columns), strict=True))
        ends = zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)
        return {
            (names[a], names[b]): value for (a, b), value in zip(ends, graph.edge_attribution.tolist(), strict=True)
        }

    expected, found = edges(theirs), edges(ours)
    largest = max(map(abs, expected.values()))
    for pair in expected.keys() | found.keys():
        # One that is not there lies below the threshold, next to which an edge may fall on either side.
        within = SAME_EDGES * largest if pair in expected and pair in found else 1.01 * theirs_threshold(theirs)
        assert abs(expected.get(pair, 0) - found.get(pair, 0)) <= within, pair
    assert ours.largest_conservation_error <= 2 * max(TOL.conservation_f32, theirs.largest_conservation_error)


def theirs_threshold(graph):
    return graph.provenance.attribution.min_attribution


def velocity_and_feature(exact, prepared):
    """Returns two weighted targets of a trace with outputs: the velocity, and the strongest feature of img/2."""
    velocity = resolve_target(exact.pipe, exact.trace, parse_target("velocity:"))
    return [(velocity, 2.0), (strongest_feature(prepared, exact.tcs, "img", 2), 1.0)]
