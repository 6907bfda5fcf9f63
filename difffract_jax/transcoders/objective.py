"""What a transcoder is trained to minimise, for a batch of rows of one site (docs/method.md, section 2).

    fit   = mean_rows |y - y^|^2 / (sum of y's variances over rows + 1e-6), the fraction of variance unexplained
    relu        fit + sparsity * mean_rows sum_f z                            the reference's loss
    topk,       fit + aux_weight * aux; the code is as sparse as k says       Gao et al. 2024; Bussmann et al. 2024
    batchtopk
    jumprelu    fit + l0_weight * (L0 / sparsity - 1)^2, `sparsity` being the L0 wanted; the jump has no slope, so the
                threshold's gradient is that of a jump smeared over `bandwidth`     Rajamanoharan et al. 2024

`aux` revives features that have been silent for `dead_after` rows: the `aux_k` strongest of them per row shall explain
what the others left, r = y - y^. It is |r - W_dec z_dead|^2 over r's own variance: no b_dec, which y^ has already.
A feature whose pre-activations are all negative has no gradient there. `lift_weight` * mean_rows sum_dead
relu(cut-off - u) raises those until they fire (Anthropic's pre-activation loss, for dead features alone).

With `sparse`, codes of topk and batchtopk are multiplied at their active features alone (`active`); the same numbers.
`aux` is never a dense product: without `sparse` it is one over the dead features (`revival`).

Rows may lie on several devices of a mapped axis. Means over rows are then means of means: variances and L0 enter as
constants that the devices agree on, so that the mean of the devices' gradients is the gradient of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.transcoders import active
from difffract_jax.transcoders.revival import matmul, revived
from difffract_jax.transcoders.transcoder import Transcoder, above, batch_cutoff

EPSILON = 1e-6
"""Added to the variance, as the reference does."""


class ActivationRows(NamedTuple):
    """Rows of one site, or of several with a leading site axis.

    Attributes:
        x: what the transcoder reads.
        y: what it shall return.
        t: denoising time of each row, in [0, 1].
    """

    x: Float[Array, "*site rows d_model"]
    y: Float[Array, "*site rows d_model_out"]
    t: Float[Array, "*site rows"]


Width = int | tuple[int, int]
"""Channels of a row: of x and of y, or one number where both have as many."""


def widths(width: Width) -> tuple[int, int]:
    """Returns the channels of x and of y."""
    return (width, width) if isinstance(width, int) else width


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Constants of the loss; those that differ between sites are arguments.

    Attributes:
        aux_weight: of `aux`; 0 leaves it out.
        lift_weight: of what raises dead features' pre-activations; 0 leaves it out.
        aux_k: silent features per row that `aux` may use.
        dead_after: rows after which a silent feature counts as dead.
        l0_weight: of `jumprelu`'s penalty.
        bandwidth: over which a jump is smeared, in units of the pre-activations.
        bf16: multiply matrices in bfloat16, with sums in float32.
        sparse: multiply codes of topk and batchtopk at their active features alone, in float32; for rows that lie on
            one device, and dense otherwise.
        mesh: devices that rows and features are spread over; None for a single one.
        branch: skip `aux` as a whole where nothing is dead. Densely it then does next to nothing anyway, and a branch
            copies what it reads, which an accelerator's memory may not hold; a processor is a fifth faster with it.
    """

    aux_weight: float = 0.0
    lift_weight: float = 0.0
    aux_k: int = 32
    dead_after: int = 1_000_000
    l0_weight: float = 1.0
    bandwidth: float = 0.05
    bf16: bool = False
    sparse: bool = False
    mesh: Mesh | None = None
    branch: bool = True


class Coded(NamedTuple):
    """What the loss reads of a batch's codes; means over this device's rows.

    Attributes:
        y: y^ of every row.
        l1: sum of a row's code.
        l0: active features per row.
        fired: which features were active in any row.
        cutoff: of `batchtopk`; else 0.
    """

    y: Float[Array, "rows d_model_out"]
    l1: Float[Array, ""]
    l0: Float[Array, ""]
    fired: Bool[Array, "feat"]
    cutoff: Float[Array, ""]


class Report(NamedTuple):
    """What a loss computed besides; means over rows, on every device the same.

    Attributes:
        loss: what is minimised.
        fvu: fraction of variance unexplained.
        l1: sum of a row's code.
        l0: active features per row.
        cutoff: what a pre-activation had to exceed, `batchtopk`; else 0.
        fired: which features were active in any row.
    """

    loss: Float[Array, "*site"]
    fvu: Float[Array, "*site"]
    l1: Float[Array, "*site"]
    l0: Float[Array, "*site"]
    cutoff: Float[Array, "*site"]
    fired: Bool[Array, "*site feat"]


def site_loss(
    tc: Transcoder,
    rows: ActivationRows,
    silent: Int[Array, "feat"],
    sparsity: Float[Array, ""],
    revive: Bool[Array, ""],
    pressure: Float[Array, ""],
    objective: Objective,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Report]:
    """Returns the loss of one site, and what came up on the way.

    Args:
        tc: the site's transcoder.
        rows: a batch, or this device's part of it.
        silent: rows since each feature was last active.
        sparsity: weight of the L1 penalty, or L0 wanted; not read by topk and batchtopk.
        revive: whether to compute `aux`; the same for all sites, as a branch is then skipped, not computed and dropped.
        pressure: factor of the penalty for active features, which may rise to 1 while training begins.
        objective: constants.
        axis: mapped axis of the devices that hold the other rows; None if these are all.
    """

    def mean(value: Float[Array, "rows *rest"]) -> Float[Array, "*rest"]:
        local = jnp.mean(value, axis=0)
        return local if axis is None else jax.lax.pmean(local, axis)

    sparse = objective.sparse and axis is None and "topk" in tc.config.activation
    x = encoder_input(tc, rows)
    u = encoder_preactivations(tc, x, objective)
    code = _code_active(tc, rows.x, x, u, objective) if sparse else _code(tc, rows.x, u, objective, axis)
    residual = rows.y - code.y
    variance = jnp.sum(mean(jnp.square(rows.y - mean(rows.y)[None]))) + EPSILON
    fit = jnp.mean(jnp.sum(jnp.square(residual), axis=1)) / variance
    l0 = mean(code.l0[None])
    loss = fit
    match tc.config.activation:
        case "relu":
            loss = loss + pressure * sparsity * code.l1
        case "jumprelu":
            loss = loss + pressure * objective.l0_weight * _excess(tc, u, l0, sparsity, objective)
        case _:
            if objective.lift_weight:
                # Sparsely, u has no gradient: what needs one makes its own, and only where something is dead.
                again = partial(encoder_preactivations, tc, x, objective) if sparse else lambda: u
                lift = partial(_lift, again, silent, code.cutoff, objective)
                loss = loss + objective.lift_weight * jax.lax.cond(revive, lift, lambda: jnp.zeros((), u.dtype))
            if objective.aux_weight:
                left = jax.lax.stop_gradient(residual)
                again = partial(_revived_active if sparse else _revived, tc, x, u)
                dead = (silent > objective.dead_after) & revive
                aux = partial(_aux, again, left, dead, objective, mean)
                none = partial(jnp.zeros, (), left.dtype)
                branch = sparse or objective.branch
                loss = loss + objective.aux_weight * (jax.lax.cond(revive, aux, none) if branch else aux())
    fired = code.fired
    if axis is not None:
        fired = jax.lax.pmax(fired.astype(jnp.int32), axis) > 0
    whole = [mean(value[None]) for value in jax.lax.stop_gradient((loss, fit, code.l1))]
    return loss, Report(loss=whole[0], fvu=whole[1], l1=whole[2], l0=l0, cutoff=code.cutoff, fired=fired)


def encoder_input(tc: Transcoder, rows: ActivationRows) -> Float[Array, "rows d_model"]:
    """Returns (1 + alpha) * x + beta of rows of mixed times."""
    alpha, beta = jax.vmap(tc.scale_shift)(rows.t)
    return (1 + alpha) * rows.x + beta


def encoder_preactivations(
    tc: Transcoder, x: Float[Array, "rows d_model"], objective: Objective
) -> Float[Array, "rows feat"]:
    """Returns u of encoder inputs."""
    assert tc.enc.bias is not None  # made with one
    return matmul(x, tc.enc.kernel[...], objective.bf16) + tc.enc.bias[None, :]


def _code(
    tc: Transcoder,
    x: Float[Array, "rows d_model"],
    u: Float[Array, "rows feat"],
    objective: Objective,
    axis: str | None,
) -> Coded:
    """Returns codes and y^ by dense products."""
    z, cutoff = sparse_codes(tc, u, objective, axis)
    l0 = jnp.mean(jnp.sum(z > 0, axis=1).astype(z.dtype))
    return Coded(decode_codes(tc, z, x, objective), jnp.mean(jnp.sum(z, axis=1)), l0, jnp.any(z > 0, axis=0), cutoff)


def _code_active(
    tc: Transcoder,
    x: Float[Array, "rows d_model"],
    encoded: Float[Array, "rows d_model"],
    u: Float[Array, "rows feat"],
    objective: Objective,
) -> Coded:
    """Returns the same by products at the active features; `encoded` is what the encoder read."""
    u = jax.lax.stop_gradient(u)
    if tc.config.activation == "topk":
        pairs, cutoff = active.largest_per_row(u, tc.config.k), jnp.zeros((), u.dtype)
    else:
        pairs, cutoff = active.largest_of_batch(u, tc.config.k)
    assert tc.enc.bias is not None and tc.dec.bias is not None  # made with them
    value = jax.nn.relu(active.at_active(encoded, tc.enc.kernel[...], tc.enc.bias[...], u, pairs))
    y = active.decoded(value, tc.dec.kernel[...], pairs) + tc.dec.bias[None, :]
    if tc.config.skip:
        y = y + matmul(x, tc.skip.kernel[...], objective.bf16)
    rows, features = u.shape
    fired = jnp.zeros(features, bool).at[pairs.feature].max(value > 0)
    return Coded(y, jnp.sum(value) / rows, jnp.sum(value > 0).astype(u.dtype) / rows, fired, cutoff)


def sparse_codes(
    tc: Transcoder, u: Float[Array, "rows feat"], objective: Objective, axis: str | None
) -> tuple[Float[Array, "rows feat"], Float[Array, ""]]:
    """Returns the codes, and the cut-off of `batchtopk`."""
    none = jnp.zeros((), u.dtype)
    match tc.config.activation:
        case "batchtopk":
            cutoff = batch_cutoff(u, tc.config.k, axis=axis)
            return above(u, cutoff), cutoff
        case "jumprelu":
            return jump(u, tc.threshold[...], objective.bandwidth), none
        case _:
            return tc.activate(u), none


def decode_codes(
    tc: Transcoder, z: Float[Array, "rows feat"], x: Float[Array, "rows d_model"], objective: Objective
) -> Float[Array, "rows d_model_out"]:
    """Returns y^ of codes; see `Transcoder.decode`."""
    assert tc.dec.bias is not None  # made with one
    y = matmul(z, tc.dec.kernel[...], objective.bf16) + tc.dec.bias[None, :]
    return y + matmul(x, tc.skip.kernel[...], objective.bf16) if tc.config.skip else y


def _lift(
    again: Callable[[], Float[Array, "rows feat"]],
    silent: Int[Array, "feat"],
    cutoff: Float[Array, ""],
    objective: Objective,
) -> Float[Array, ""]:
    """Returns by how much the dead features miss the cut-off, in all."""
    dead = silent > objective.dead_after
    return jnp.mean(jnp.sum(jnp.where(dead[None], jax.nn.relu(cutoff - again()), 0), axis=1))


def _aux(
    again: Callable[..., Array],
    residual: Float[Array, "rows d_model_out"],
    dead: Bool[Array, "feat"],
    objective: Objective,
    mean: Callable[[Array], Array],
) -> Float[Array, ""]:
    """Returns how much of the residual the dead features leave; 0 if there are none, with no gradient."""
    most = min(objective.aux_k, dead.shape[0])
    left = residual - again(dead, most, objective)
    variance = jnp.sum(mean(jnp.square(residual - mean(residual)[None]))) + EPSILON
    # With fewer dead features than places, each would get more than its share of the gradient.
    share = jnp.minimum(jnp.sum(dead) / most, 1)
    return share * jnp.mean(jnp.sum(jnp.square(left), axis=1)) / variance


def _revived(
    tc: Transcoder,
    encoded: Float[Array, "rows d_model"],
    u: Float[Array, "rows feat"],
    dead: Bool[Array, "feat"],
    most: int,
    objective: Objective,
) -> Float[Array, "rows d_model_out"]:
    """Returns what the `most` largest of a row's dead features decode to, by products over the dead features."""
    return revived(u, tc.dec.kernel[...], dead, most, bf16=objective.bf16, mesh=objective.mesh)


def _revived_active(
    tc: Transcoder,
    encoded: Float[Array, "rows d_model"],
    u: Float[Array, "rows feat"],
    dead: Bool[Array, "feat"],
    most: int,
    objective: Objective,
) -> Float[Array, "rows d_model_out"]:
    """Returns the same by products at these features, in float32; `encoded` is what the encoder read."""
    assert tc.enc.bias is not None  # made with one
    u = jnp.where(dead[None], jax.lax.stop_gradient(u), -jnp.inf)
    pairs = active.largest_per_row(u, most)
    value = jax.nn.relu(active.at_active(encoded, tc.enc.kernel[...], tc.enc.bias[...], u, pairs))
    return active.decoded(value, tc.dec.kernel[...], pairs)


def _excess(
    tc: Transcoder, u: Float[Array, "rows feat"], l0: Array, wanted: Float[Array, ""], objective: Objective
) -> Float[Array, ""]:
    """Returns (L0 / wanted - 1)^2, written as its tangent at the L0 of all devices: the same value and gradient."""
    smeared = jnp.mean(jnp.sum(step(u, tc.threshold[...], objective.bandwidth), axis=1))
    excess = jax.lax.stop_gradient(l0) / wanted - 1
    return excess**2 + 2 * excess * (smeared - jax.lax.stop_gradient(smeared)) / wanted


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(u: Float[Array, "rows feat"], threshold: Float[Array, "feat"], bandwidth: float) -> Float[Array, "rows feat"]:
    """Returns u where it exceeds its threshold, else 0; the threshold's gradient is that of a smeared jump.

    Args:
        u: pre-activations.
        threshold: of every feature.
        bandwidth: width of the smear; a row counts if u lies within half of it from the threshold.
    """
    return above(u, threshold[None])


def _jump_forward(u: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return jump(u, threshold, bandwidth), (u, threshold)


def _jump_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    u, threshold = saved
    slope = -threshold * jnp.sum(g * _near(u, threshold, bandwidth), axis=0)
    return jnp.where(u > threshold[None], g, 0), slope


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(u: Float[Array, "rows feat"], threshold: Float[Array, "feat"], bandwidth: float) -> Float[Array, "rows feat"]:
    """Returns 1 where u exceeds its threshold, else 0; gradient to the threshold alone, as for `jump`."""
    return (u > threshold[None]).astype(u.dtype)


def _step_forward(u: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return step(u, threshold, bandwidth), (u, threshold)


def _step_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    u, threshold = saved
    return jnp.zeros_like(u), -jnp.sum(g * _near(u, threshold, bandwidth), axis=0)


def _near(u: Array, threshold: Array, bandwidth: float) -> Array:
    """The rectangular kernel of height 1 / bandwidth around each threshold."""
    return (jnp.abs(u - threshold[None]) < bandwidth / 2).astype(u.dtype) / bandwidth


jump.defvjp(_jump_forward, _jump_backward)
step.defvjp(_step_forward, _step_backward)
