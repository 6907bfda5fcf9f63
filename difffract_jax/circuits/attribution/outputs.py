"""Outputs as targets: directions of the velocity, and pixel objectives (docs/method.md, section 6).

    velocity:contrast="other prompt"[,box=X0,Y0,X1,Y1|mask=FILE.png]
    velocity:[box=X0,Y0,X1,Y1|mask=FILE.png]
    pixels:color=NAME|#RRGGBB[,minus=NAME|#RRGGBB][,box=X0,Y0,X1,Y1|mask=FILE.png]

1. `parse_target` reads a FEATURE or one of these.
2. `resolve_target` turns it into an `engine.Output`, a linear function of the step's velocity v and latents z:
   - velocity: <d, v>, d the unit vector along v - v' on the region's tokens, v' the velocity with the other prompt at
     the same latents; without a contrast along v itself.
   - pixels: the mean over the region of rgb - grey along the colour minus grey (or minus another colour), rgb in [0, 1]
     as the decoder gives it, unclipped, at the predicted clean latents z - sigma v. The decoder is linearised there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import ImageColor

from difffract_jax.circuits.attribution.engine import Output
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask, read_mask, tokens_in
from difffract_jax.circuits.trace.capture import Span, Trace, run_of_trace
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.guidance import guided
from difffract_jax.models.pipeline import Pipeline, decode_raw, encode, model_velocity, step_inputs
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.streaming import jit_resident
from difffract_jax.ops import widen

GREY = (0.5, 0.5, 0.5)
FORMS = 'velocity:contrast="other prompt"[,box=X0,Y0,X1,Y1|mask=FILE.png] or pixels:color=NAME[,box=...|mask=...]'
_OPTION = re.compile(r'(?P<key>\w+)=(?:"(?P<quoted>[^"]*)"|(?P<plain>[^,"]*(?:,-?\d+)*))(?:,|$)')


@dataclass(frozen=True)
class Region:
    """A box, or the bright part of a mask; the whole image if neither is given.

    Attributes:
        box: X0,Y0,X1,Y1 in pixels.
        mask: image file.
    """

    box: str | None = None
    mask: Path | None = None

    def pixels(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Returns which pixels it holds, of an image of that size; see `region` for what is refused."""
        if self.mask is not None:
            return read_mask(self.mask, (height, width))
        return np.ones((height, width), bool) if self.box is None else box_mask(self.box, (height, width))


@dataclass(frozen=True)
class VelocityTarget:
    """A direction of the velocity.

    Attributes:
        text: as it was written.
        contrast: prompt whose velocity is subtracted; None for the velocity itself.
        region: of the image.
    """

    text: str
    contrast: str | None
    region: Region


@dataclass(frozen=True)
class PixelTarget:
    """A colour of a region.

    Attributes:
        text: as it was written.
        colour: red, green, blue in [0, 1].
        minus: colour that it is set against.
        region: of the image.
    """

    text: str
    colour: tuple[float, float, float]
    minus: tuple[float, float, float]
    region: Region


def parse_target(text: str) -> Feature | VelocityTarget | PixelTarget:
    """Reads a TARGET.

    Args:
        text: a FEATURE, or one of the forms of the module docstring.

    Raises:
        UserError: if it is of another form, or contradicts itself.

    Example:
        >>> parse_target("pixels:color=red,box=0,0,8,8").colour
        (1.0, 0.0, 0.0)
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        return Feature.parse(text)
    keys = {"velocity": {"contrast", "box", "mask"}, "pixels": {"color", "minus", "box", "mask"}}
    if kind not in keys:
        raise UserError(f"{text!r} is not a target; write a FEATURE, as in img/3/f401@12, or {FORMS}.")
    given = _options(text, rest)
    unknown = sorted(set(given) - keys[kind])
    if unknown:
        raise UserError(f"{text!r} has no option {unknown[0]}; {kind} takes {', '.join(sorted(keys[kind]))}.")
    if "box" in given and "mask" in given:
        raise UserError(f"{text!r} names a box and a mask, which contradict each other; keep one.")
    region = Region(given.get("box"), Path(given["mask"]) if "mask" in given else None)
    if kind == "velocity":
        return VelocityTarget(text, given.get("contrast"), region)
    if "color" not in given:
        raise UserError(f"{text!r} names no colour; write for example pixels:color=red,box=0,0,16,16.")
    colour, minus = _colour(text, given["color"]), _colour(text, given["minus"]) if "minus" in given else GREY
    if np.allclose(colour, minus, atol=0.5 / 255):
        against = "the colour it is set against" if "minus" in given else "grey, against which colours are measured"
        raise UserError(f"{text!r} asks for {against}; choose two colours that differ.")
    return PixelTarget(text, colour, minus, region)


def _options(text: str, rest: str) -> dict[str, str]:
    """Reads `a=b,c="d, e"`."""
    found: dict[str, str] = {}
    at = 0
    while at < len(rest):
        match = _OPTION.match(rest, at)
        if match is None:
            raise UserError(f"{text!r} is not a target: {rest[at:]!r} is not of the form key=value; write {FORMS}.")
        if match["key"] in found:
            raise UserError(f"{text!r} gives {match['key']} twice, which contradicts itself; keep one.")
        found[match["key"]] = match["quoted"] if match["quoted"] is not None else match["plain"]
        at = match.end()
    return found


def _colour(text: str, value: str) -> tuple[float, float, float]:
    try:
        red, green, blue = ImageColor.getrgb(value)[:3]
    except ValueError:
        raise UserError(
            f"{value!r} in {text!r} is not a colour; give a CSS name, as red or orange, or #RRGGBB."
        ) from None
    return red / 255, green / 255, blue / 255


def resolve_target(
    pipe: Pipeline, trace: Trace | Span, target: VelocityTarget | PixelTarget, *, step: int | None = None
) -> Output:
    """Turns an output into a linear function of one step's velocity and latents.

    Args:
        pipe: the pipeline that was traced.
        trace: from `capture` with `output`, or from `capture_steps`.
        target: from `parse_target`.
        step: the step of a span; its last if left out.

    Raises:
        UserError: if the velocity is not recorded, the step not traced, the region empty, or the direction zero.
    """
    traces = trace.traces if isinstance(trace, Span) else (trace,)
    step = trace.info.step if step is None else step
    of_step = tuple(t for t in traces if t.info.step == step)
    if not of_step:
        steps = ", ".join(map(str, dict.fromkeys(t.info.step for t in traces)))
        raise UserError(f"{target.text} is asked for at step {step}, but the traced steps are {steps}.")
    if any(one.record.velocity is None for one in of_step) or len(of_step) < of_step[0].info.branches:
        how = (
            "capture with output=True" if of_step[0].info.branches == 1 else "record both branches, with capture_steps"
        )
        raise UserError(f"{target.text} needs the velocity, which this trace does not hold; {how}.")
    if isinstance(target, VelocityTarget):
        return _resolve_velocity(pipe, of_step, target)
    return _resolve_pixels(pipe, of_step, target)


def _velocity_of(branches: Sequence[Trace]) -> Float[Array, "img outputs"]:
    """Returns the velocity of a step from the traces of its evaluations."""
    velocities = [one.record.velocity for one in branches if one.record.velocity is not None]
    return velocities[0] if len(velocities) == 1 else guided(velocities, branches[0].info.guidance)


def _resolve_velocity(pipe: Pipeline, branches: Sequence[Trace], target: VelocityTarget) -> Output:
    record, info = branches[0].record, branches[0].info
    unit = PATCH * pipe.config.vae.factor
    mask = target.region.pixels(info.grid[0] * unit, info.grid[1] * unit)
    inside = np.zeros(mask.size // unit**2, bool)
    inside[list(tokens_in(mask, info.grid))] = True
    velocity = _velocity_of(branches)
    direction = velocity
    if target.contrast is not None:
        other = _other_velocity(pipe, branches[0], target.contrast)
        changed = (branches[0]._replace(record=record._replace(velocity=other)), *branches[1:])
        direction = direction - _velocity_of(changed)
    direction = jnp.where(jnp.asarray(inside)[:, None], direction, 0)
    norm = float(jnp.linalg.norm(direction))
    rounding = 1e-5 if pipe.transformer.img_in.kernel.dtype.itemsize >= 4 else 1e-2
    if not norm > rounding * float(jnp.linalg.norm(jnp.where(jnp.asarray(inside)[:, None], velocity, 0))):
        why = "gives" if target.contrast is None else "and the prompt of the run give"
        what = "no velocity" if target.contrast is None else "the same velocity"
        raise UserError(f"{target.text} {why} {what} in the region, up to rounding; choose another prompt or region.")
    return Output(target.text, info.step, direction / norm, jnp.zeros_like(record.latents), 0.0)


def _other_velocity(pipe: Pipeline, trace: Trace, prompt: str) -> Float[Array, "img outputs"]:
    """Returns the velocity of the prompt's evaluation with another prompt, at the recorded latents."""
    info = trace.info
    run = run_of_trace(pipe, info)
    inputs = step_inputs(run, encode(pipe, prompt, info.text_tokens), trace.record.latents, info.step)
    with jax.default_matmul_precision("highest"):
        return _velocity(pipe.transformer, inputs, jnp.int32(info.step), info.grid)


_velocity = jit_resident(model_velocity, static_argnums=3)


def _resolve_pixels(pipe: Pipeline, branches: Sequence[Trace], target: PixelTarget) -> Output:
    record, info = branches[0].record, branches[0].info
    # Not `record.t`: a bfloat16 run feeds its transformer a rounded time, but steps by the exact one.
    sigma = jnp.asarray(info.sigmas[info.step], record.latents.dtype)
    clean = record.latents - sigma * _velocity_of(branches)
    height, width = (side * PATCH * pipe.config.vae.factor for side in info.grid)
    inside = jnp.asarray(target.region.pixels(height, width))
    with jax.default_matmul_precision("highest"):
        value, gradient = _objective(
            jax.tree.map(widen, pipe.vae),
            clean,
            inside,
            jnp.asarray(target.colour),
            jnp.asarray(target.minus),
            info.grid,
        )
    constant = float(value) - float(np.vdot(np.asarray(gradient, np.float64), np.asarray(clean, np.float64)))
    return Output(target.text, info.step, -sigma * gradient, gradient, constant)


@partial(jax.jit, static_argnames="grid")
def _objective(
    vae: Autoencoder, clean: Array, inside: Array, colour: Array, minus: Array, grid: tuple[int, int]
) -> tuple[Float[Array, ""], Float[Array, "img channels"]]:
    """Returns the objective at clean latents, and its gradient."""

    def value(latents: Array) -> Float[Array, ""]:
        return colour_of(decode_raw(vae, latents, grid) / 2 + 0.5, inside, colour, minus)

    return jax.value_and_grad(value)(clean)


def colour_of(
    image: Float[Array, "H W rgb"], inside: Array, colour: Float[Array, "rgb"], minus: Float[Array, "rgb"]
) -> Float[Array, ""]:
    """Returns the mean over a region of rgb - minus along colour - minus; 0 at `minus`, in units of [0, 1].

    Args:
        image: rgb, black at 0 and white at 1.
        inside: the region's pixels, [H W].
        colour: asked for.
        minus: what it is set against.
    """
    along = (colour - minus) / jnp.linalg.norm(colour - minus)
    along, minus = along.astype(image.dtype), minus.astype(image.dtype)
    seen = jnp.sum((image - minus[None, None]) * along[None, None], axis=-1)
    return jnp.sum(jnp.where(inside, seen, 0)) / jnp.sum(inside, dtype=seen.dtype)
