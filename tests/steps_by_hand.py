"""One training step of a transcoder by hand: PyTorch's gradient of the loss as docs/method.md states it, in float64."""

from typing import Any

import numpy as np
import torch

from difffract_jax.transcoders.step import Recipe
from difffract_jax.transcoders.transcoder import Transcoder

LINEAR = ("enc", "dec", "film", "time_in", "time_out")


def weights_of(tc: Transcoder) -> dict[str, np.ndarray]:
    """Returns the weights of one transcoder, or of several with a leading axis, by layer and `kernel` or `bias`."""
    leaves = {(layer, name): getattr(getattr(tc, layer), name)[...] for layer in LINEAR for name in ("kernel", "bias")}
    return {f"{layer}.{name}": np.asarray(leaf, np.float64) for (layer, name), leaf in leaves.items()}


def step_by_hand(
    weights: dict[str, np.ndarray], x: Any, y: Any, t: Any, sparsity: float, recipe: Recipe
) -> tuple[float, dict[str, np.ndarray]]:
    """Takes Adam's first step on fvu + sparsity * L1 for a ReLU transcoder with FiLM.

    Args:
        weights: before the step, from `weights_of`.
        x: [rows d_model], scaled.
        y: [rows d_model], scaled.
        t: [rows], denoising time in [0, 1].
        sparsity: weight of the L1 penalty.
        recipe: learning rate and epsilon; the first step of Adam does not depend on its decays.

    Returns:
        The loss, and the weights after the step.
    """
    w = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in weights.items()}
    x, y, t = (torch.tensor(np.asarray(a, np.float64)) for a in (x, y, t))

    def linear(layer: str, given: torch.Tensor) -> torch.Tensor:
        return given @ w[f"{layer}.kernel"] + w[f"{layer}.bias"]

    half = w["time_in.kernel"].shape[0] // 2
    angles = 1000 * t[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    silu = torch.nn.functional.silu
    hidden = silu(linear("time_out", silu(linear("time_in", torch.cat([angles.cos(), angles.sin()], dim=1)))))
    scale, shift = linear("film", hidden).chunk(2, dim=1)
    z = torch.relu(linear("enc", (1 + scale) * x + shift))
    error = (y - linear("dec", z)).square().sum(dim=1).mean()
    loss = error / (y.var(dim=0, unbiased=False).sum() + 1e-6) + sparsity * z.sum(dim=1).mean()
    loss.backward()
    after = {}
    for name, leaf in w.items():
        assert leaf.grad is not None
        after[name] = (leaf - recipe.lr * leaf.grad / (leaf.grad.abs() + recipe.eps)).detach().numpy()
    after["dec.kernel"] /= np.linalg.norm(after["dec.kernel"], axis=1, keepdims=True)
    return float(loss.detach()), after
