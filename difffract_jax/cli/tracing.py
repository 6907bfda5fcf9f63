"""What `trace` opens and records, for one run or for many."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difffract_jax.address import BRANCHES, PROMPT, read_steps
from difffract_jax.circuits.attribution.attribute import Target
from difffract_jax.circuits.attribution.outputs import PixelTarget, VelocityTarget, parse_target, resolve_target
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import Span, Trace, capture, capture_steps
from difffract_jax.circuits.trace.imported import load_trace
from difffract_jax.cli import preflight
from difffract_jax.cli.models import dtype_named, mesh_for, spread_model
from difffract_jax.cli.opening import open_model
from difffract_jax.cli.options import check_used
from difffract_jax.cli.runs import run_of, starting_noise
from difffract_jax.cli.used import load_used, up_to_targets
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.sampler import PATCH
from difffract_jax.sharding import traced_transcoders
from difffract_jax.trace_settings import TraceConfig
from difffract_jax.transcoders.transcoder import TranscoderSet

TargetOf = Feature | VelocityTarget | PixelTarget
"""A target as it is written: a feature, or an output."""


class Tracing(NamedTuple):
    """What all runs of a command share.

    Attributes:
        pipe: the pipeline.
        tcs: transcoders of the sites that are used.
        targets: as they were named.
        weights: one per target.
        steps: first and last.
        expansion: arguments of `attribute`.
    """

    pipe: Any
    tcs: Any
    targets: list[Any]
    weights: list[float]
    steps: tuple[int, int]
    expansion: dict[str, Any]


def open_tracing(settings: TraceConfig) -> Tracing:
    """Opens a model and the transcoders that its targets need, once all that can be refused cheaply is.

    Args:
        settings: of the command.
    """
    if settings.prompt is None and settings.prompts is None:
        raise UserError("PROMPT is missing; give the prompt of the run, or --prompts FILE to trace many.")
    targets, devices = [parse_target(text) for text in listed(settings.target)], mesh_for(settings.mesh)
    weights, steps = read_weights(settings.weight, len(targets)), read_steps(settings.step)
    outputs = any(not isinstance(one, Feature) for one in targets)
    _check_explained(settings)
    preflight.check_fits("trace", settings, output=outputs, targets=targets)
    pipe, place = open_model("trace", settings, sharding=spread_model(devices), output=outputs, targets=targets)
    used = up_to_targets(pipe.config.transformer.layout, targets, steps)
    options = {"dtype": dtype_named(settings.transcoder_dtype), "weights": place}
    options |= {} if devices is None else {"sharding": traced_transcoders(devices)}
    tcs = load_used(settings.transcoders, used, sites=settings.sites, **options)
    names = {"max_nodes", "expansion_batch", "min_attribution", "precision", "attention", "max_scores", "pooled"}
    expansion = settings.model_dump(include=names) | {"mesh": devices}
    expansion |= {"pipe": pipe} if settings.pooled == "explained" else {}
    return Tracing(pipe, tcs, targets, weights, steps, expansion)


def _check_explained(settings: TraceConfig) -> None:
    """Refuses, before anything is loaded, what attention and the pooled path are not explained with."""
    if settings.attention == "frozen":
        check_used(settings, ("max_scores",), "without --attention explained; add that, or leave it out.")
    for option, nodes in (("attention", "attention scores"), ("pooled", "modulations")):
        if getattr(settings, option) == "explained" and settings.export_json is not None:
            raise UserError(
                f"The reference's JSON has no {nodes} as nodes; leave --export-json out, or --{option} explained."
            )
    if settings.pooled == "explained" and settings.activations is not None:
        raise UserError(
            "Imported activations do not tell what the model does with another pooled embedding; leave --activations "
            "out, or --pooled explained."
        )
    if settings.pooled == "explained" and settings.weights in ("host", "disk"):
        raise UserError(
            f"The pooled path is explained with all blocks in memory, but --weights is {settings.weights}; give "
            "--weights device, or leave --pooled out."
        )


def recorded(opened: Tracing, settings: TraceConfig) -> Any:
    """Records the run that the settings describe, or takes it from the file they name.

    Args:
        opened: from `open_tracing`.
        settings: of the run.
    """
    pipe, tcs, padding = opened.pipe, opened.tcs, settings.include_padding
    if settings.activations is not None:
        if settings.negative_prompt is not None:
            raise UserError(
                f"{settings.activations} holds a run of one evaluation a step; leave --negative-prompt out."
            )
        names = {"seed", "steps", "height", "width", "text_tokens", "guidance", "prompt", "step", "latents", "noise"}
        given = settings.model_dump(include=names, exclude_unset=True)
        return import_run(settings.activations, pipe, tcs, given, include_padding=padding)
    assert settings.prompt is not None
    run, latents = run_of(pipe, settings), starting_noise(pipe, settings)
    asked = settings.prompt, opened.targets, opened.steps
    return record_run(pipe, tcs, *asked, seed=settings.seed, run=run, latents=latents, include_padding=padding)


def resolved(opened: Tracing, trace: Any) -> list[tuple[Any, float]]:
    """Returns the targets of a recorded run, each with its weight."""
    return list(zip(resolve_all(opened.pipe, trace, opened.targets), opened.weights, strict=True))


def listed(value: str | tuple[str, ...]) -> list[str]:
    """Returns one text or several as a list."""
    return [value] if isinstance(value, str) else list(value)


def read_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns one weight per target, equal ones if none are given.

    Args:
        weights: in the order of the targets.
        count: number of targets.

    Raises:
        UserError: if their number differs.
    """
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise UserError(f"There are {count} targets, but {len(weights)} weights; give one per target, or none.")
    return list(weights)


def record_run(
    pipe: Pipeline, tcs: TranscoderSet, prompt: str, targets: Sequence[TargetOf], traced: tuple[int, int], **run: Any
) -> Trace | Span:
    """Records what the targets need: one step, through to the velocity for outputs; or all steps of a span.

    With guidance by two branches one step is its evaluation in the branch of the targets, or both for outputs.

    Args:
        pipe: the pipeline.
        tcs: its transcoders.
        prompt: of the run.
        targets: as they are written.
        traced: first and last step.
        run: the rest of `capture`'s arguments.
    """
    first, last = traced
    if first != last:
        return capture_steps(pipe, tcs, prompt, first=first, last=last, **run)
    output = any(not isinstance(one, Feature) for one in targets)
    branches = {one.branch or BRANCHES[PROMPT] for one in targets if isinstance(one, Feature)}
    planned = run.get("run") or pipe.plan()
    if planned.branches > 1 and (output or len(branches) > 1):
        return capture_steps(pipe, tcs, prompt, first=first, last=last, **run)
    branch = next(iter(branches)) if len(branches) == 1 else BRANCHES[PROMPT]
    return capture(pipe, tcs, prompt, step=first, output=output, branch=branch, **run)


def import_run(
    path: Path, pipe: Pipeline, tcs: TranscoderSet, given: Mapping[str, Any], *, include_padding: bool
) -> Trace:
    """Makes a trace of a file of activations, whose run must be the one asked for.

    Args:
        path: the file.
        pipe: the pipeline.
        tcs: its transcoders.
        given: what was asked for by name, by the names of the settings of `difffract trace`; what is left out is the
            file's.
        include_padding: replace the MLPs of padded text positions too.

    Raises:
        UserError: as `load_trace`, or if something asked for is not the file's.
    """
    noise = sorted({"latents", "noise"} & given.keys())
    if noise:
        raise UserError(f"{path} brings the latents of its step; leave out {' and '.join(noise)}.")
    trace = load_trace(path, pipe, tcs, include_padding=include_padding)
    info, unit = trace.info, PATCH * pipe.config.vae.factor
    held = {"prompt": info.prompt, "step": info.step, "seed": info.seed, "steps": len(info.sigmas) - 1}
    held |= {"height": info.grid[0] * unit, "width": info.grid[1] * unit, "text_tokens": info.text_tokens}
    held |= {} if info.guidance is None else {"guidance": info.guidance}
    for name, value in held.items():
        if name in given and given[name] is not None and str(given[name]) != str(value):
            raise UserError(
                f"{name} is {given[name]!r}, but the activations in {path} were recorded with {value!r}; give the "
                "file's, or record again."
            )
    return trace


def resolve_all(pipe: Pipeline, trace: Trace | Span, targets: Sequence[TargetOf]) -> list[Target]:
    """Turns targets as asked for into targets of a trace; outputs lie in its last step."""
    return [one if isinstance(one, Feature) else resolve_target(pipe, trace, one) for one in targets]
