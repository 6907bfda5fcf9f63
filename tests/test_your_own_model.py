"""The worked example of a model of one's own runs, in small, and is exact."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.graphs.graph import FEATURE, SCORE, Graph
from difffract_jax.loading import load_transcoders
from difffract_jax.models.pipeline import encode, initial_noise, model_velocity, sample
from tolerances import TOL

FILE = Path(__file__).parents[1] / "examples" / "your_own_model.py"


def example():
    """The example, imported as a module."""
    spec = importlib.util.spec_from_file_location("your_own_model", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_model_of_one_s_own_is_trained_on_traced_and_shown(tmp_path, capsys):
    small = {"steps": 60, "batch": 64, "expansion": 4, "k": 6, "buffer_rows": 512, "warmup": 0}
    pipe, tcs, graph = example().main(tmp_path, lessons=60, **small)
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert np.count_nonzero(graph.node_kind == FEATURE) > 1
    assert Graph.load(tmp_path / "robot.npz").provenance.run.layout == pipe.config.transformer.layout
    page = (tmp_path / "robot.html").read_text(encoding="utf-8")
    assert "grab" in page and "expert" in page
    missed = float(capsys.readouterr().out.split("velocity by ")[1].split()[0])
    assert missed <= TOL.f32_run * 10

    again = load_transcoders(tmp_path / "transcoders")
    assert (again.source, again.sites) == (graph.provenance.transcoders, tcs.sites)
    trace = capture(pipe, again, "wave up slowly", step=1, output=True)
    explained = attribute(
        trace,
        again,
        target=strongest_feature(trace, again, "expert", 2),
        max_nodes=4,
        attention="explained",
        max_scores=4,
    )
    (told,) = explained.provenance.attention
    assert abs(told.total - told.forward) <= TOL.conservation_f32 * told.absolute
    assert np.any(explained.node_kind == SCORE) or told.total == 0

    run = pipe.plan()
    made = sample(
        model_velocity, pipe.transformer, run, encode(pipe, "reach up", run.text_tokens), initial_noise(pipe, run, 0)
    )
    assert made.shape == (8, 4) and np.isfinite(made).all()
