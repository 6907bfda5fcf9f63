"""Weights that a transformer's training begins with: blocks that are plain residual blocks, and a velocity of zero.

1. Every modulation is the identity: shifts and scales 0, gates 1.
2. FLUX.2's modulations have no biases. There the matrices begin with what is nearest: the least-squares solution of
   gates 1 at every time, and for shifts and scales small random weights as elsewhere.
3. The last modulation and the last projection are zero.
4. Stable Diffusion 3's table of positions is that of its checkpoints, sines and cosines, which are not trained there
   either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT, time_channels
from difffract_jax.models.sd3 import Sd3MMDiT

FIXED = ("positions",)
"""Names of weights that are not trained."""
SMALL = 0.1
"""What random weights of modulations are multiplied by."""
TIMES = 65
"""Times in [0, 1] at which FLUX.2's gates are fitted to 1."""


def begin_plain(model: MMDiT) -> None:
    """Sets a transformer's first weights, in place."""
    if isinstance(model, Flux2MMDiT):
        _shared(model)
    else:
        for stream in _streams(model):
            bias = np.zeros(stream.mod.bias.shape, np.float32).reshape(len(stream.mod.bias), -1, model.config.d_model)
            bias[:, stream.gate_rows] = 1
            stream.mod.bias[...] = jnp.asarray(bias.reshape(stream.mod.bias.shape))
            stream.mod.kernel[...] = SMALL * stream.mod.kernel[...]
    if isinstance(model, Sd3MMDiT):
        model.positions[...] = jnp.asarray(position_table(model.config.table, model.config.d_model))
    for layer in (model.final.mod, model.final.proj):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])


def _streams(model: MMDiT) -> list[Any]:
    """Returns what has modulations of its own: both streams of double-stream blocks, single-stream blocks as such."""
    parts = ((stack.img, stack.txt) if hasattr(stack, "img") else (stack,) for stack in model.stacks)
    return [stream for pair in parts for stream in pair]


def _shared(model: Flux2MMDiT) -> None:
    """Makes the modulations of FLUX.2's blocks begin near the identity."""
    width = model.config.d_model
    times = jnp.linspace(0, 1, TIMES)
    vectors = jax.vmap(lambda t: jax.nn.silu(model.time_in(time_channels(t, jnp.float32))))(times)
    gate = jnp.linalg.lstsq(vectors, jnp.ones((TIMES, width)), rcond=1e-3)[0]
    for layer, stream in zip(model.shared.layers, _streams(model), strict=True):
        kernel = SMALL * layer.kernel[...].reshape(width, -1, width)
        for row in stream.gate_rows:
            kernel = kernel.at[:, row].set(gate)
        layer.kernel[...] = kernel.reshape(layer.kernel.shape)


def position_table(side: int, width: int) -> Float32[np.ndarray, "side side width"]:
    """Returns the positions of Stable Diffusion 3's checkpoints: half the channels tell the column, half the row.

    Args:
        side: rows and columns.
        width: channels; a multiple of 4.
    """
    wavelengths = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * wavelengths
    along = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(along[None, :], (side, side, width // 2))
    rows = np.broadcast_to(along[:, None], (side, side, width // 2))
    return np.concatenate([columns, rows], axis=2).astype(np.float32)
