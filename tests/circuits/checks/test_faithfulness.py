"""Taking a feature off in the real model moves the others as the reference measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.checks.faithfulness import ablate, live_reading
from difffract_jax.circuits.frozen.replacement import prepare_step
from difffract_jax.circuits.frozen.targets import Targets, preactivations
from tolerances import REFERENCE, TOL, relative_error
from traces import golden_trace, make_exact


@pytest.mark.parametrize("number", range(4))
def test_perturbations_are_the_reference_s(golden, number):
    trace, _ = golden_trace(golden, number)
    data = np.load(REFERENCE / f"golden_graph_{number}.npz")
    columns = (data[f"pert_{name}"] for name in ("stream", "layer", "pos", "feat"))
    nodes = Targets(*(jnp.asarray(column, jnp.int32) for column in columns))
    replacement = prepare_step(trace, golden.tcs)
    before = preactivations(replacement, nodes, trace.record.mlp_in)
    assert relative_error(before, data["pert_h_pre"][0]) <= TOL.intervention_f32
    after = ablate(replacement, nodes, nodes)
    assert relative_error(after, data["pert_h_pre"][1:]) <= TOL.intervention_f32
    # The changes themselves are differences of float32 numbers 10 to 1000 times their size.
    moved, expected = after - np.asarray(before)[None], data["pert_h_pre"][1:] - data["pert_h_pre"][:1]
    assert relative_error(moved, expected) <= TOL.intervention_f32


def test_no_change_leaves_the_recorded_inputs(x64):
    exact = make_exact()
    zeros = jax.tree.map(jnp.zeros_like, exact.trace.record.mlp_out)
    found = live_reading(exact.replacement, zeros).mlp_in
    for ours, recorded in zip(found[:2], exact.trace.record.mlp_in[:2], strict=True):
        assert relative_error(ours, recorded) <= TOL.x64


def test_an_inactive_feature_moves_nothing_when_taken_off(x64):
    exact = make_exact()
    u = preactivations(exact.replacement, all_features(exact), exact.trace.record.mlp_in)
    off = int(np.argmin(u))
    feature = jax.tree.map(lambda column: column[off : off + 1], all_features(exact))
    assert relative_error(ablate(exact.replacement, feature, all_features(exact))[0], u) <= TOL.x64


def all_features(exact):
    """Every feature of img/2 at position 3."""
    count = exact.tcs.config.features
    columns = (np.zeros(count), np.full(count, 2), np.full(count, 3), np.arange(count))
    return Targets(*(jnp.asarray(column, jnp.int32) for column in columns))
