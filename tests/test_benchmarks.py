"""The benchmark of attribution counts what it says, and its largest size runs, made small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from difffract_jax.circuits.attribution import attribute
from difffract_jax.models.tiny import TINY


@pytest.fixture
def attribution(monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "attribution.py"
    spec = importlib.util.spec_from_file_location("attribution_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.ARGS, "nodes", 6)
    monkeypatch.setattr(module.ARGS, "expansion_batch", 2)
    monkeypatch.setattr(module.ARGS, "repeats", 1)
    monkeypatch.setattr(module, "ACTIVE_IN_FLUX", 0.1)
    return module


def test_the_size_of_flux_runs_on_a_small_shape(attribution, monkeypatch):
    monkeypatch.setattr(attribution.ARGS, "sites", "all")
    trace, tcs, target = attribution.flux(TINY, features=64, side=6, text=8)
    found = attribution.measure("flux", trace, tcs, target)
    assert found["expanded"] == 6 and found["edges"] > 6
    assert found["active"] == pytest.approx([6.4] * len(found["active"]), abs=1)
    graph = attribute(trace, tcs, target=target, max_nodes=1)
    assert graph.node_block[graph.target_node].tolist() == [TINY.depth_double + TINY.depth_single - 1]


def test_floors_count_what_lies_below_a_target(attribution, monkeypatch):
    monkeypatch.setattr(attribution.ARGS, "sites", "all")
    trace, tcs, _ = attribution.flux(TINY, features=64, side=6, text=8)
    held = attribution.layers_of(trace, tcs)
    rows, width, double = 36 + 8, TINY.d_model, TINY.depth_double
    # Block 1's MLP reads two blocks' attention and one block's features; single-stream block 1's reads four and four.
    each = 4 * rows * width**2 + 2 * rows**2 * width
    for block, hops, layers in ((1, 2, 1), (double + 1, 4, 4)):
        flops = hops * each + 2 * width * held.active[:layers].sum()
        assert attribution.floor_flops(trace, held, np.array([block])) == flops
        moved = 4 * (2 * held.places[:layers].sum() + width * held.vectors[:layers].sum() + 4 * width**2 * hops)
        assert attribution.floor_bytes(trace, held, np.array([block])) == moved
    assert (held.vectors <= held.active).all() and (held.active <= held.places).all() and held.vectors.min() > 0
