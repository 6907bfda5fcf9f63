"""What a user asks to have traced, as text: steps, targets, weights; and the run that must be recorded for it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difffract_jax.circuits.attribution.attribute import Target
from difffract_jax.circuits.attribution.outputs import PixelTarget, VelocityTarget, resolve_target
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import Span, Trace, capture, capture_steps
from difffract_jax.circuits.trace.imported import load_trace
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.sampler import PATCH
from difffract_jax.transcoders.transcoder import TranscoderSet

Asked = Feature | VelocityTarget | PixelTarget


def read_steps(text: int | str) -> tuple[int, int]:
    """Reads `2` or `0-3`.

    Args:
        text: a step, or the first and the last.

    Returns:
        First and last step; the same twice for one.

    Raises:
        UserError: if it is neither, or descends.

    Example:
        >>> read_steps("0-3"), read_steps(2)
        ((0, 3), (2, 2))
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text).strip())
    if match is None:
        raise UserError(f"step must be a step, as in 1, or steps in a row, as in 0-3, but got {str(text)!r}.")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UserError(f"The steps {text} count down; write {last}-{first}.")
    return first, last


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
    pipe: Pipeline, tcs: TranscoderSet, prompt: str, asked: Sequence[Asked], traced: tuple[int, int], **run: Any
) -> Trace | Span:
    """Records what the targets need: one step, through to the velocity for outputs; or all steps of a span.

    Args:
        pipe: the pipeline.
        tcs: its transcoders.
        prompt: of the run.
        asked: the targets.
        traced: first and last step.
        run: the rest of `capture`'s arguments.
    """
    first, last = traced
    if first != last:
        return capture_steps(pipe, tcs, prompt, first=first, last=last, **run)
    output = any(not isinstance(one, Feature) for one in asked)
    return capture(pipe, tcs, prompt, step=first, output=output, **run)


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


def resolve_all(pipe: Pipeline, trace: Trace | Span, asked: Sequence[Asked]) -> list[Target]:
    """Turns targets as asked for into targets of a trace; outputs lie in its last step."""
    return [one if isinstance(one, Feature) else resolve_target(pipe, trace, one) for one in asked]
