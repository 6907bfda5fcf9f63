"""What cotangents bring from one step of a span to the earlier ones (docs/method.md, sections 6 and 12).

Packed latents obey z_i = z_0 + sum over earlier evaluations of their step of sigma, times their branch's weight, times
their velocity. A cotangent G of z_i is therefore one of every earlier velocity, and of z_0.

1. `Carried` gathers G, and its counterpart of the text embeddings, while evaluations are walked from last to first.
2. `ends_step`, `begins_step` and `after_step` are the same order and the same sum forwards.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.trace.capture import TraceInfo
from difffract_jax.circuits.trace.record import Weights
from difffract_jax.models.blocks import Streams


def ends_step(infos: Sequence[TraceInfo], number: int) -> bool:
    """Says whether an evaluation is the last of its step.

    Args:
        infos: of the evaluations, in order.
        number: of the evaluation.
    """
    return number + 1 == len(infos) or infos[number + 1].step != infos[number].step


def begins_step(infos: Sequence[TraceInfo], number: int) -> bool:
    """Says whether an evaluation is the first of its step; arguments as for `ends_step`."""
    return not number or infos[number - 1].step != infos[number].step


def after_step(z: Array, infos: Sequence[TraceInfo], velocities: Sequence[Array]) -> Array:
    """Returns latents after a step, or what a change of them becomes.

    Args:
        z: entering the step.
        infos: of its evaluations.
        velocities: of each.
    """
    return z + reduce(add, (info.taken * velocity for info, velocity in zip(infos, velocities, strict=True)))


def enter(weights: Weights, latents: Float[Array, "img channels"], text: Float[Array, "txt text_width"]) -> Streams:
    """Returns the residual streams entering the first block."""
    return Streams(weights.img_in(latents), weights.txt_in(text))


@jax.jit
def pull_enter(weights: Weights, boundary: Streams) -> tuple[Array, Array]:
    """Pulls cotangents of the residual streams, [target rows d_model] each, back to latents and text embedding."""
    with jax.default_matmul_precision("highest"):
        kernels = (weights.img_in.kernel[...], weights.txt_in.kernel[...])
        latents, text = (jnp.einsum("tsm,cm->tsc", c, k) for c, k in zip(boundary, kernels, strict=True))
        return latents, text


def branches_of(steps: Sequence[Replacement], infos: Sequence[TraceInfo]) -> tuple[Replacement, ...]:
    """Returns the evaluations of the first step, by branch: their text is that of all steps."""
    return tuple(one for one, info in zip(steps, infos, strict=True) if info.step == infos[0].step)


class Carried:
    """What some targets' cotangents have brought to latents and text so far; evaluations come from last to first.

    Attributes:
        latents: cotangents of the latents entering the last step that was begun, [target img channels].
        text: of each branch's text embedding, [target txt text_width].
        boundary: of the residual streams entering the first block of the evaluation that came last.
    """

    def __init__(self, steps: Sequence[Replacement], infos: Sequence[TraceInfo], targets: int) -> None:
        self.steps, self.infos = steps, infos
        record = steps[0].record
        self.latents = jnp.zeros((targets, *record.latents.shape), record.boundary.img.dtype)
        self.text = [
            jnp.zeros((targets, *record.text.shape), record.boundary.txt.dtype) for _ in branches_of(steps, infos)
        ]
        self.boundary: Streams | None = None
        # What reaches a step's latents through its evaluations so far.
        self._entering: Array | None = None

    def gather(self, number: int, boundary: Streams | None) -> None:
        """Takes in what an evaluation of a span gives.

        Args:
            number: of the evaluation.
            boundary: cotangents of the residual streams entering its first block; None if nothing reaches it.
        """
        self.boundary = boundary
        if boundary is not None:
            latents, text = pull_enter(self.steps[number].record.weights, boundary)
            branch = self.infos[number].branch
            self.text[branch] = self.text[branch] + text
            self._entering = latents if self._entering is None else self._entering + latents
        if begins_step(self.infos, number) and self._entering is not None:
            self.latents, self._entering = self.latents + self._entering, None

    def inputs(self) -> Array:
        """Returns the edges of a span's inputs: every branch's text embedding, and the first latents."""
        pairs = zip(self.text, branches_of(self.steps, self.infos), strict=True)
        text = [jnp.einsum("tsc,sc->ts", c, one.record.text, precision="highest") for c, one in pairs]
        return jnp.concatenate([*text, self.from_latents()], axis=1)

    def from_latents(self) -> Float[Array, "target img"]:
        """Returns the edges of the first step's latents."""
        return jnp.einsum("tsc,sc->ts", self.latents, self.steps[0].record.latents, precision="highest")
