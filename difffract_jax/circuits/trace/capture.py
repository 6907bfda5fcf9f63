"""A trace: everything the replacement of one denoising step holds fixed (docs/method.md, section 3).

1. Run the sampler up to the step, and no further.
2. Run the transformer's blocks once, from the first to the last that is needed, and record of each the queries and
   keys, the norm scales, and the MLPs' inputs and outputs. Needed are the blocks with a transcoder and those between;
   with `output`, all that follow too, so that the velocity itself can be explained.
3. Mark the positions whose MLPs may be replaced: all image tokens, and the prompt's own text tokens. Transcoders never
   saw padding in training, so that padded positions keep their true MLP unless `include_padding` says otherwise.
4. Where a pooled embedding enters, run the blocks once more with that of the empty prompt, live: the replacement holds
   the path through it constant, and a graph reports how much of its target goes that way.

`capture_steps` records consecutive steps from the first block on: then the image input of a step is carried back
through the Euler updates, and one graph spans them all (docs/method.md, section 6).

Nothing here depends on the transcoders but the range of blocks. Attention patterns are not stored: q and k give them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.address import BRANCHES, PROMPT
from difffract_jax.circuits.trace.record import Blocks, Record, Weights, read_live, record_step, take_weights
from difffract_jax.circuits.trace.sweep import record_sweep
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, html_of, spans, text_of
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.guidance import guided
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import (
    EncodedPrompt,
    Pipeline,
    Run,
    encode,
    encode_run,
    initial_noise,
    model_velocity,
    sample,
    step_inputs,
)
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.streaming import streams_layers
from difffract_jax.models.tokenizers import encode_prompt, written_tokens
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
        traces: one per evaluation: steps ascending, and with guidance by two branches the prompt's of each before the
            negative one; they share their weights.
    """

    traces: tuple[Trace, ...]

    @property
    def info(self) -> TraceInfo:
        """Where the last step comes from, of two branches the prompt's."""
        return main_info([one.info for one in self.traces])

    def __repr__(self) -> str:
        return text_of(*_page(self.traces))

    def _repr_html_(self) -> str:
        return html_of(*_page(self.traces))


def main_info(infos: Sequence[TraceInfo]) -> TraceInfo:
    """Returns the last step's among the evaluations of a trace, of two branches the prompt's if it is there.

    Args:
        infos: of the evaluations, in the order of `Span`.
    """
    return next((one for one in infos if one.step == infos[-1].step and one.branch == PROMPT), infos[-1])


def one_evaluation(info: TraceInfo) -> str:
    """Returns how a sentence goes on that asks for one evaluation in place of a span's.

    Args:
        info: of the span.
    """
    step = "a single step, as --step 1"
    return step if info.branches == 1 else f"{step}, with a feature as its target, in one branch of guidance"


def _page(traces: tuple[Trace, ...]) -> tuple[str, dict[str, str]]:
    """Returns what a trace or a span shows of itself: a title and facts."""
    first, last, record = traces[0].info, traces[-1].info, traces[-1].record
    steps = f"step {last.step}" if first.step == last.step else f"steps {first.step} to {last.step}"
    if last.branches > 1:
        steps += ", both branches" if len(traces) > 1 else f", the branch {BRANCHES[last.branch]}"
    template = sum(token.startswith("<|") for token in last.tokens)
    own = sum(token not in ("<pad>", "[PAD]") for token in last.tokens) - template
    told = f"{own} the prompt's{f', {template} of the chat template' if template else ''}"
    stacks = " and ".join(f"{stack.depth} {stack.name}" for stack in last.layout.stacks)
    blocks = f"{spans(last.recorded)} of {last.layout.depth} ({stacks})"
    return f"Trace of {steps} of {len(last.sigmas) - 1}", {
        "prompt": f'"{last.prompt}"',
        **({} if last.negative_prompt is None else {"negative prompt": f'"{last.negative_prompt}"'}),
        "seed": "latents were given" if last.latents_given else str(last.seed),
        "tokens": f"{last.grid[0]} x {last.grid[1]} of the image, {last.text_tokens} of text ({told})",
        "blocks": blocks if record.velocity is None else f"{blocks}, and the velocity",
        "arrays": tree_text([trace.record for trace in traces]),
        "model": hash_text(last.model),
    }


def run_of_trace(pipe: Pipeline, info: TraceInfo) -> Run:
    """Returns the sizes and the schedule that a traced run had.

    Args:
        pipe: the pipeline that it ran on.
        info: of the run.
    """
    unit = PATCH * pipe.config.vae.factor
    height, width = (side * unit for side in info.grid)
    steps = len(info.sigmas) - 1
    return pipe.plan(
        steps=steps,
        height=height,
        width=width,
        text_tokens=info.text_tokens,
        guidance=info.guidance,
        negative_prompt=info.negative_prompt,
    )


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
    branch: str = BRANCHES[PROMPT],
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
        branch: with guidance by two branches which to record, prompt or negative; their common velocity is recorded by
            `capture_steps`.

    Raises:
        UserError: if the step or a size is out of range, the transcoders do not fit the model, the run has no such
            branch, or `output` is wanted of one branch of two.
    """
    run = run or pipe.plan()
    if branch not in BRANCHES[: run.branches]:
        raise UserError(
            f"branch must be {' or '.join(BRANCHES[: run.branches])} in this run, which has "
            f"{'two branches' if run.branches > 1 else 'one evaluation a step'}, but got {branch!r}."
        )
    if output and run.branches > 1:
        raise UserError(
            "With guidance by two branches the velocity of a step is that of both; record both, with capture_steps."
        )
    blocks, number = blocks_for(pipe.config.transformer, tcs, output), BRANCHES.index(branch)
    span = _capture(pipe, prompt, run, blocks, (step, step), seed, latents, include_padding, (number,))
    return span.traces[0]


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
    blocks, run = Blocks(0, pipe.config.transformer.layout.depth, True), run or pipe.plan()
    branches = tuple(range(run.branches))
    return _capture(pipe, prompt, run, blocks, (first, last), seed, latents, include_padding, branches)


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
    branches: tuple[int, ...],
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
    encoded = encode_run(pipe, prompt, run)
    # Where nothing pooled enters, there is nothing to exchange.
    empty = encode(pipe, "", run.text_tokens) if pipe.config.transformer.pooled_width else None
    with jax.default_matmul_precision("highest"), on_mesh_of(pipe.transformer):
        z = sample(model_velocity, pipe.transformer, run, encoded, initial_noise(pipe, run, seed, latents), stop=first)
        recorder = _Recorder(pipe, run, blocks, encoded, empty, include_padding, branches)
        records = recorder.steps(z, range(first, last + 1))
    config = pipe.config.transformer
    negative = run.negative_prompt if run.branches > 1 else None
    tokens = [_pieces(pipe, text, run) for text in (prompt, negative) if text is not None]
    infos = (
        TraceInfo(
            prompt=prompt,
            cut=encoded.cut,
            seed=seed,
            step=step,
            sigmas=tuple(map(float, run.sigmas)),
            grid=run.grid,
            text_tokens=run.text_tokens,
            tokens=tokens[0],
            guidance=run.guidance,
            recorded=tuple(range(blocks.first, blocks.end)),
            layout=config.layout,
            include_padding=include_padding,
            latents_given=latents is not None,
            model=pipe.source,
            model_origin=pipe.origin or None,
            base_model=pipe.base or None,
            loras=pipe.loras,
            negative_prompt=negative,
            negative_tokens=tokens[1] if len(tokens) > 1 else (),
            branch=branch,
        )
        for step in range(first, last + 1)
        for branch in branches
    )
    return Span(tuple(Trace(*pair) for pair in zip(records, infos, strict=True)))


def _pieces(pipe: Pipeline, text: str, run: Run) -> tuple[str, ...]:
    """Returns the tokens of a text."""
    return tuple(written_tokens(pipe.tokenizers, encode_prompt(pipe.tokenizers, text, run.text_tokens)))


class _Recorder(NamedTuple):
    """What the evaluations of a trace are recorded with; `branches` are those that are."""

    pipe: Pipeline
    run: Run
    blocks: Blocks
    encoded: EncodedPrompt
    empty: EncodedPrompt | None
    include_padding: bool
    branches: tuple[int, ...]

    def steps(self, z: Float[Array, "img channels"], steps: range) -> list[Record]:
        """Records steps one after the other; the run without pooled embeddings, if any, goes its own way."""
        records: list[Record] = []
        other, weights = z, None
        for step in steps:
            mine: list[Record] = []
            for branch in self.branches:
                record = self.evaluation(z, other, step, branch, weights)
                # One copy of the weights for all evaluations.
                weights = record.weights if weights is None else weights
                mine.append(record._replace(weights=weights))
            records += mine
            if step < steps[-1]:
                # The recorded velocities are those that the graph adds up, whatever the type of the model's weights.
                step_of = jnp.asarray(self.run.sigmas[step + 1], z.dtype) - jnp.asarray(self.run.sigmas[step], z.dtype)
                z = z + step_of * self._velocity([record.velocity for record in mine])
                unpooled = [record.unpooled for record in mine if record.unpooled is not None]
                other = other + step_of * self._velocity([one.velocity for one in unpooled]) if unpooled else other
        return records

    def evaluation(self, z: Array, other: Array, step: int, branch: int, weights: Weights | None) -> Record:
        """Records one evaluation, from the latents of the run and of the one without pooled embeddings."""
        model, run, blocks = self.pipe.transformer, self.run, self.blocks
        prompt = self.encoded.branches[branch]
        mask = jax.device_put(np.ones_like(prompt.mask) if self.include_padding else np.asarray(prompt.mask))
        inputs, unpooled = step_inputs(run, prompt, z, step), None
        if self.empty is not None:
            unpooled = step_inputs(run, prompt._replace(pooled=self.empty.pooled), other, step)
        if streams_layers(model):
            return record_sweep(model, inputs, unpooled, mask, run.grid, blocks, weights)
        weights = take_weights(model, blocks, run.grid) if weights is None else weights
        reading = None if unpooled is None else read_live(model, weights, unpooled, run.grid, blocks)
        return record_step(model, weights, inputs, mask, run.grid, blocks)._replace(unpooled=reading, weights=weights)

    def _velocity(self, branches: Sequence[Array | None]) -> Array:
        """Returns the velocity of a step from those of its branches."""
        velocity = [one for one in branches if one is not None]
        return velocity[0] if self.run.branch_scale is None else guided(velocity, self.run.branch_scale)
