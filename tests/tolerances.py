"""The one table of tolerances, each with its reason, and the error measure they refer to.

Every comparison of arrays in the suite is `relative_error(ours, expected) <= TOL.<kind>`: the 2-norm of the difference
over the 2-norm of the expectation, computed in float64.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

REFERENCE = Path(__file__).parent / "data" / "reference"


class Tolerances(NamedTuple):
    """Largest accepted relative errors (2-norm)."""

    f32_block: float = 1e-5
    """One block in float32 against PyTorch: both round every product, in another order (about 1e-6 measured)."""
    f32_time: float = 1e-4
    """The conditioning vector in float32: time enters as angles of up to 1,000 rad, guidance of up to 3,500, which
    float32 holds to 2e-4 rad; PyTorch's vector and ours are each about 2e-5 from the exact one."""
    f32_run: float = 1e-4
    """A whole sampling run in float32: the block errors of four steps compound through the residual stream."""
    edge: float = 1e-5
    """Largest edge error over the largest edge, against the reference's float32 graphs."""
    conservation_f32: float = 1e-6
    """|sum of edges + bias - pre-activation| over the sum of absolute edges and bias, float32, one step."""
    conservation_steps_f32: float = 1e-6
    """The same over several steps, of one evaluation or two: that a step's latents are a rounded sum of velocities
    costs nothing beside the target's own rounding, 4.6e-7 at most measured (docs/accuracy.md)."""
    conservation_x64: float = 1e-9
    """The same in float64: leaves room for 1e4 roundings of 1e-16 and no more."""
    intervention_x64: float = 1e-9
    """Edge against its direct intervention in float64, per edge."""
    direct_f32: float = 1e-6
    """The same in float32, over the target's sum of absolute edges: a few roundings of 6e-8 of a sum of that size."""
    intervention_f32: float = 1e-4
    """Whole-run interventions against the reference's final latents, as `f32_run`."""
    x64: float = 1e-10
    """Identities that hold exactly in real arithmetic, evaluated in float64."""
    sharded: float = 1e-5
    """Sharded against single-device float32: reductions are split in another order."""
    pmap: float = 1e-6
    """A few training steps under pmap against jit: the mean of eight parts' gradients, one rounding apart."""
    bf16: float = 2e-2
    """bfloat16 keeps 8 bits: one rounding is 4e-3, a few blocks stay within this."""


TOL = Tolerances()


def relative_error(ours, expected) -> float:
    """Returns the 2-norm of the difference over the 2-norm of `expected`, both taken to float64."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape, f"shapes differ: {ours.shape} against {expected.shape}"
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
