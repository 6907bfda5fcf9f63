"""The benchmark of attribution counts what it says, and its largest size runs, made small; commands timed exist."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import typer

from difffract_jax.circuits.frozen.replacement import prepare_step
from difffract_jax.cli.main import app
from difffract_jax.models.tiny import TINY


def benchmark(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attribution(monkeypatch):
    module = benchmark("attribution")
    monkeypatch.setattr(module.ARGS, "nodes", 6)
    monkeypatch.setattr(module.ARGS, "expansion_batch", 2)
    monkeypatch.setattr(module.ARGS, "repeats", 1)
    monkeypatch.setattr(module, "ACTIVE_IN_FLUX", 0.1)
    return module


@pytest.mark.slow
def test_the_size_of_flux_runs_on_a_small_shape(attribution, capsys):
    config = dataclasses.replace(TINY, depth_double=18, depth_single=1)
    trace, tcs, target = attribution.flux(config, features=64, side=6, text=8)
    assert tcs.sites.groups == dict.fromkeys(("img", "txt"), tuple(range(2, 18)))
    assert (tcs.stacks["img"].dec.kernel.dtype, jax.tree.leaves(trace.record.weights)[0].dtype) == (
        "float32",
        "bfloat16",
    )
    found = attribution.measure("flux", trace, tcs, target)
    assert found["expanded"] == 6 and found["edges"] > 6 and found["blocks"] == [16, 0]
    assert found["active"] == pytest.approx([6.4, 6.4], abs=1)
    assert str(target).startswith("img/17/") and "s per node: " in capsys.readouterr().err


def test_floors_count_what_lies_below_a_target(attribution, monkeypatch):
    monkeypatch.setattr(attribution.ARGS, "sites", "all")
    trace, tcs, target = attribution.flux(TINY, features=64, side=6, text=8)
    held = attribution.layers_of(prepare_step(trace, tcs))
    rows, width, double, single = 36 + 8, TINY.d_model, TINY.depth_double, TINY.depth_single
    assert (
        tcs.stacks["joint"].dec.kernel.dtype == "bfloat16" and target.stream == "single" and target.block == single - 1
    )
    # All is in bfloat16: both streams of a double-stream block have a matrix for values and one for the output.
    assert held.projections.tolist() == [2 * 2 * 2 * width**2] * double + [2 * 2 * width**2] * single
    assert (held.decoders <= 2 * width * held.active).all() and (held.decoders > 0).all()
    assert (held.active <= held.places).all() and held.active.mean() == pytest.approx(6.4 * rows, rel=0.1)
    # Block 1's MLP reads two blocks' attention and one block's features; single-stream block 1's reads four and four.
    each = 4 * rows * width**2 + 2 * rows**2 * width
    for block, hops, layers in ((1, 2, 1), (double + 1, 4, 4)):
        flops = hops * each + 2 * width * held.active[:layers].sum()
        assert attribution.floor_flops(trace, held, np.array([block])) == flops
        moved = 8 * held.places[:layers].sum() + held.decoders[:layers].sum() + held.projections[:hops].sum()
        assert attribution.floor_bytes(trace, held, np.array([block])) == moved


@pytest.mark.slow
def test_the_laws_among_the_bars_hold():
    rows = list(benchmark("bars").laws())
    assert len(rows) == 3 and all(row.measured <= row.bar for row in rows)


def test_the_commands_that_are_timed_have_the_options_that_they_are_given():
    main = typer.main.get_command(app)
    for timed in benchmark("commands").COMMANDS:
        if timed.name != "python":
            context = main.commands[timed.name].make_context(timed.name, list(timed.arguments))
            assert context.params["out" if "--out" in timed.arguments else "json"] is not None
