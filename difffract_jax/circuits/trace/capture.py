"""A trace: everything the replacement of one denoising step holds fixed (docs/method.md, section 3).

1. Run the sampler up to the step, and no further.
2. Run the transformer's blocks once, from the first to the last that is needed, and record of each the queries and
   keys, the norm scales, and the MLPs' inputs and outputs. Needed are the blocks with a transcoder and those between;
   with `output`, all that follow too, so that the velocity itself can be explained.
3. Mark the positions whose MLPs may be replaced: all image tokens, and the prompt's own text tokens. Transcoders never
   saw padding in training, so that padded positions keep their true MLP unless `include_padding` says otherwise.
4. Run the blocks once more with the pooled embedding of the empty prompt, live: the replacement holds the path through
   it constant, and a graph reports how much of its target goes that way.

`capture_steps` records consecutive steps from the first block on: then the image input of a step is carried back
through the Euler updates, and one graph spans them all (docs/method.md, section 6).

Nothing here depends on the transcoders but the range of blocks. Attention patterns are not stored: q and k give them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from difffract_jax.circuits.trace.record import Blocks, Record, read_live, record_step, take_weights
from difffract_jax.circuits.trace.sweep import record_sweep
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, html_of, spans, text_of
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import (
    EncodedPrompt,
    Pipeline,
    Run,
    encode,
    initial_noise,
    model_velocity,
    sample,
    step_inputs,
)
from difffract_jax.models.streaming import streams_layers
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.spread import on_mesh_of
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit
from difffract_jax.trees import tree_text


class Trace(NamedTuple):
    """One denoising step of one run, recorded.

    Attributes:
        record: the arrays.
        info: where they come from.
    """

    record: Record
    info: TraceInfo

    def __repr__(self) -> str:
        return text_of(*_page((self,)))

    def _repr_html_(self) -> str:
        return html_of(*_page((self,)))


class Span(NamedTuple):
    """Consecutive denoising steps of one run, each recorded from the first block to the velocity.

    Attributes:
        traces: one per step, ascending; they share their weights.
    """

    traces: tuple[Trace, ...]

    @property
    def info(self) -> TraceInfo:
        """Where the last step comes from."""
        return self.traces[-1].info

    def __repr__(self) -> str:
        return text_of(*_page(self.traces))

    def _repr_html_(self) -> str:
        return html_of(*_page(self.traces))


def _page(traces: tuple[Trace, ...]) -> tuple[str, dict[str, str]]:
    """Returns what a trace or a span shows of itself: a title and facts."""
    first, last, record = traces[0].info, traces[-1].info, traces[-1].record
    steps = f"step {last.step}" if len(traces) == 1 else f"steps {first.step} to {last.step}"
    own = sum(token not in ("<pad>", "[PAD]") for token in last.tokens)
    stacks = " and ".join(f"{stack.depth} {stack.name}" for stack in last.layout.stacks)
    blocks = f"{spans(last.recorded)} of {last.layout.depth} ({stacks})"
    return f"Trace of {steps} of {len(last.sigmas) - 1}", {
        "prompt": f'"{last.prompt}"',
        "seed": "latents were given" if last.latents_given else str(last.seed),
        "tokens": f"{last.grid[0]} x {last.grid[1]} of the image, {last.text_tokens} of text ({own} the prompt's)",
        "blocks": blocks if record.velocity is None else f"{blocks}, and the velocity",
        "arrays": tree_text([trace.record for trace in traces]),
        "model": hash_text(last.model),
    }


def capture(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    *,
    seed: int = 0,
    step: int = 0,
    output: bool = False,
    run: Run | None = None,
    latents: Any = None,
    include_padding: bool = False,
) -> Trace:
    """Records one denoising step of a run, in at least float32 whatever the type of the weights.

    Args:
        pipe: the pipeline.
        tcs: transcoders that the trace is for; they tell which blocks to record.
        prompt: of the run.
        seed: seed of the starting noise.
        step: step to record, from 0.
        output: record through to the velocity, so that it can be a target.
        run: sizes and schedule, from `pipe.plan`; the pipeline's defaults if left out.
        latents: packed starting noise instead of the seed's.
        include_padding: replace the MLPs of padded text positions too, as the reference does.

    Raises:
        UserError: if the step or a size is out of range, or the transcoders do not fit the model.
    """
    blocks = blocks_for(pipe.config.transformer, tcs, output)
    return _capture(pipe, prompt, run or pipe.plan(), blocks, (step, step), seed, latents, include_padding).traces[0]


def capture_steps(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    *,
    first: int = 0,
    last: int,
    seed: int = 0,
    run: Run | None = None,
    latents: Any = None,
    include_padding: bool = False,
) -> Span:
    """Records consecutive denoising steps of a run, each from the first block to the velocity.

    Args:
        pipe: the pipeline.
        tcs: transcoders that the trace is for.
        prompt: of the run.
        first: first step; the latents entering it are the span's input.
        last: last step; a graph's target lies in it unless it says otherwise.
        seed: this and the rest as for `capture`.
        run: sizes and schedule.
        latents: packed starting noise.
        include_padding: replace the MLPs of padded text positions too.

    Raises:
        UserError: as `capture`, or if the steps are not in order.
    """
    blocks_for(pipe.config.transformer, tcs, True)
    blocks = Blocks(0, pipe.config.transformer.layout.depth, True)
    return _capture(pipe, prompt, run or pipe.plan(), blocks, (first, last), seed, latents, include_padding)


def blocks_for(config: FluxConfig, tcs: TranscoderSet, output: bool) -> Blocks:
    """Returns the blocks that a trace for these transcoders must record.

    Args:
        config: shape of the model.
        tcs: the transcoders.
        output: whether the velocity is recorded.

    Raises:
        UserError: if the transcoders do not fit the model, or are none.
    """
    check_fit(tcs, config)
    blocks = [block for placed in tcs.sites.slots(config.layout) for block in placed]
    if tcs.config.role != "transcoder" or not blocks:
        raise UserError(
            "Tracing needs transcoders, which map an MLP's input to its output, but these are "
            f"{'SAEs' if blocks else 'none'}; give a directory of transcoders."
        )
    return Blocks(min(blocks), config.layout.depth if output else max(blocks) + 1, output)


def _capture(
    pipe: Pipeline,
    prompt: str,
    run: Run,
    blocks: Blocks,
    steps: tuple[int, int],
    seed: int,
    latents: Any,
    include_padding: bool,
) -> Span:
    first, last = steps
    count = run.steps
    for step in steps:
        if not 0 <= step < count:
            raise UserError(
                f"step must lie in [0, {count}), as the run has {count} steps counted from 0, but got {step}."
            )
    if last < first:
        raise UserError(f"The steps of a trace must ascend, but got {first} to {last}.")
    encoded, empty = encode(pipe, prompt, run.text_tokens), encode(pipe, "", run.text_tokens)
    mask = np.ones_like(encoded.mask) if include_padding else encoded.mask
    with jax.default_matmul_precision("highest"), on_mesh_of(pipe.transformer):
        z = sample(model_velocity, pipe.transformer, run, encoded, initial_noise(pipe, run, seed, latents), stop=first)
        records = _record_steps(pipe, run, blocks, encoded, empty, jnp.asarray(mask), z, range(first, last + 1))
    config, ids = pipe.config.transformer, encode_prompt(pipe.tokenizers, prompt, run.text_tokens)
    infos = (
        TraceInfo(
            prompt=prompt,
            cut=encoded.cut,
            seed=seed,
            step=step,
            sigmas=tuple(map(float, run.sigmas)),
            grid=run.grid,
            text_tokens=run.text_tokens,
            tokens=tuple(pipe.tokenizers.t5.convert_ids_to_tokens(ids.t5_ids.tolist())),
            guidance=run.guidance,
            recorded=tuple(range(blocks.first, blocks.end)),
            layout=config.layout,
            include_padding=include_padding,
            latents_given=latents is not None,
            model=pipe.source,
            model_origin=pipe.origin or None,
            base_model=pipe.base or None,
            loras=pipe.loras,
        )
        for step in range(first, last + 1)
    )
    return Span(tuple(Trace(*pair) for pair in zip(records, infos, strict=True)))


def _record_steps(
    pipe: Pipeline,
    run: Run,
    blocks: Blocks,
    encoded: EncodedPrompt,
    empty: EncodedPrompt,
    mask: Bool[Array, "txt"],
    z: Float[Array, "img channels"],
    steps: range,
) -> list[Record]:
    """Records steps one after the other; the run without the prompt's pooled embedding goes its own way beside it."""
    records, other, weights = [], z, None
    model = pipe.transformer
    for step in steps:
        inputs = step_inputs(run, encoded, z, step)
        unpooled = step_inputs(run, encoded._replace(pooled=empty.pooled), other, step)
        if streams_layers(model):
            record = record_sweep(model, inputs, unpooled, mask, run.grid, blocks, weights)
        else:
            weights = take_weights(model, blocks) if weights is None else weights
            reading = read_live(model, weights, unpooled, run.grid, blocks)
            record = record_step(model, weights, inputs, mask, run.grid, blocks)._replace(unpooled=reading)
        # One copy of the weights for all steps.
        weights = record.weights if weights is None else weights
        records.append(record._replace(weights=weights))
        reading = record.unpooled
        if step < steps[-1]:
            # The recorded velocities are those that the graph adds up, whatever the type of the model's weights.
            step_of = jnp.asarray(run.sigmas[step + 1], z.dtype) - jnp.asarray(run.sigmas[step], z.dtype)
            z, other = (at + step_of * v for at, v in ((z, record.velocity), (other, reading.velocity)))
    return records
