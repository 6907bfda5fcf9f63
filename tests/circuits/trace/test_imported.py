"""Activations of a PyTorch run give its circuit: in float32 ours, in bfloat16 with that run's rounding."""

import json
import sys

import numpy as np
import pytest

from converters.torch_trace import main, record_activations
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.trace.imported import load_trace
from difffract_jax.cli import main as cli
from difffract_jax.config import UserError
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.graph import Graph
from difffract_jax.models.activations import ARRAYS, read_activations, write_activations
from tolerances import REFERENCE, TOL, relative_error
from traces import PROMPTS, SIZE, TEXT

SETTINGS = {"max_nodes": 20, "expansion_batch": 10, "min_attribution": 1e-4}


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """One step from the same latents, recorded by PyTorch in both types."""
    home = tmp_path_factory.mktemp("activations")
    for dtype in ("f32", "bf16"):
        noise = golden.forward["p0_initial_latents"]
        found = record_activations(
            REFERENCE / "pipeline", PROMPTS[0], step=1, steps=4, dtype=dtype, latents=noise, **SIZE
        )
        write_activations(home / f"{dtype}.npz", found)
    return home


@pytest.fixture(scope="module")
def ours(golden):
    return golden.trace(0, 1, output=True, include_padding=False)


@pytest.fixture(scope="module")
def traces(golden, files):
    return {name: load_trace(files / f"{name}.npz", golden.pipe, golden.tcs) for name in ("f32", "bf16")}


@pytest.fixture(scope="module")
def feature(golden, ours):
    return strongest_feature(ours, golden.tcs, "img", 2)


@pytest.fixture(scope="module")
def graphs(golden, ours, traces, feature):
    """Graphs of a feature and the velocity: ours, and those of the imported traces."""
    made = {}
    for name, trace in (traces | {"ours": ours}).items():
        velocity = resolve_target(golden.pipe, trace, parse_target('velocity:contrast="a blue circle"'))
        made[name] = attribute(trace, golden.tcs, target=[(feature, 1.0), (velocity, 1.0)], **SETTINGS)
    return made


def test_the_record_is_that_of_our_own_run(ours, traces):
    theirs = traces["f32"]
    assert theirs.info == ours.info
    for name in ("cond", "boundary", "frozen", "inv_std", "mlp_in", "mlp_out", "velocity", "latents"):
        recorded = getattr(ours.record, name)
        if name == "frozen":
            # A file holds what conditions the run, and no modulations.
            recorded = tuple(one._replace(mod=None) for one in recorded)
        pairs = zip(*map(_leaves, (getattr(theirs.record, name), recorded)), strict=True)
        assert max(relative_error(a, b) for a, b in pairs) <= TOL.f32_time, name
    assert theirs.record.t == ours.record.t and (theirs.record.replaceable[TEXT] == ours.record.replaceable[TEXT]).all()


def test_the_graph_in_float32_is_that_of_our_own_run(graphs):
    found = compare(graphs["f32"], graphs["ours"])
    assert not found.nodes_only_in_a + found.nodes_only_in_b
    assert found.edges_only_in_a == found.edges_only_in_b == 0 < found.edges_in_both
    assert found.largest_error <= TOL.edge
    assert graphs["f32"].largest_conservation_error <= TOL.conservation_f32


def test_a_bfloat16_run_is_traced_and_differs(graphs):
    found = compare(graphs["bf16"], graphs["f32"])
    print(f"largest edge error of bfloat16: {found.largest_error:.2g} of the largest edge")
    assert 0 < found.largest_error < np.inf and found.edges_in_both


def test_targets_of_a_bfloat16_run_add_up_to_what_it_rounded(graphs):
    # u is read from the recorded x, which every block before it rounded to 8 bits; edges and bias are exact.
    error = graphs["bf16"].largest_conservation_error
    print(f"conservation error of bfloat16: {error:.2g}")
    assert TOL.conservation_f32 < error <= TOL.bf16


def test_padding_is_replaced_if_asked_for(golden, files):
    trace = load_trace(files / "f32.npz", golden.pipe, golden.tcs, include_padding=True)
    assert trace.record.replaceable[TEXT].all() and trace.info.include_padding


def _leaves(tree):
    if tree is None:
        return []
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in _leaves(part)]
    return [np.asarray(tree)]


@pytest.fixture
def trace(monkeypatch, capsys, tmp_path, feature):
    """Runs `difffract trace PIPELINE TRANSCODERS PROMPT --activations FILE`; returns status and what it said."""

    def run(prompt, path, *more):
        models = [REFERENCE / "pipeline", REFERENCE / "transcoders", prompt, "--activations", path]
        settings = ["--target", feature, "--max-nodes", 2, "--out", tmp_path / "graph.npz"]
        monkeypatch.setattr(sys, "argv", ["difffract", "trace", *map(str, [*models, *settings, *more])])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return run


def test_the_command_line_records_and_traces(golden, files, tmp_path, trace, capsys):
    np.save(tmp_path / "noise.npy", golden.forward["p0_initial_latents"])
    sizes = ["--steps", "4", "--height", "96", "--width", "96", "--text-tokens", "16"]
    given = ["--step", "1", "--latents", str(tmp_path / "noise.npy"), "--out", str(tmp_path / "a.npz")]
    main([str(REFERENCE / "pipeline"), PROMPTS[0], *sizes, *given])
    again, first = read_activations(tmp_path / "a.npz"), read_activations(files / "f32.npz")
    assert all(np.array_equal(again.arrays[name], first.arrays[name]) for name in ARRAYS)
    capsys.readouterr()
    status, out, err = trace(PROMPTS[0], tmp_path / "a.npz", "--json")
    assert status == 0 and json.loads(out)["graph"] == str(tmp_path / "graph.npz"), err
    assert Graph.load(tmp_path / "graph.npz").provenance.settings["step"] == "1"


@pytest.mark.parametrize(
    ("prompt", "more", "sentence"),
    [
        ("a blue fox", [], "prompt is 'a blue fox', but the activations in"),
        (PROMPTS[0], ["--step", "2"], "step is '2', but the activations in"),
        (PROMPTS[0], ["--step", "0-1"], "step is '0-1', but the activations in"),
        (PROMPTS[0], ["--height", "64"], "height is 64, but the activations in"),
        (PROMPTS[0], ["--noise", "torch"], "brings the latents of its step; leave out noise"),
    ],
)
def test_another_run_than_the_file_s_is_refused(files, tmp_path, trace, prompt, more, sentence):
    status, _, err = trace(prompt, files / "f32.npz", *more)
    assert status == 1 and sentence in err
    assert not (tmp_path / "graph.npz").exists()


def _changed(files, path, **changes):
    """Writes the float32 file with other arrays; those that are None are left out."""
    with np.load(files / "f32.npz") as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": np.asarray(2)}, "must be of format_version 1, but says 2; record it again."),
        ({"format_version": None}, "must be of format_version 1, but has none"),
        ({"velocity": None, "prompt": None}, "lacks prompt, velocity; record it again."),
        ({"velocity": np.full((36, 16), np.nan, np.float32)}, "not finite (NaN or infinity) in velocity;"),
        ({"latents": np.zeros((30, 16), np.float32)}, "holds latents of shape (30, 16), but"),
        ({"step": np.asarray(4)}, "holds step 4 of a run of 4"),
        ({"grid": np.zeros(3)}, "says things about its run that cannot be read"),
        ({"text_mask": np.ones(16, bool)}, "has 16 tokens of its prompt"),
        ({"single_mlp_out": np.ones((2, 52, 64), np.float32)}, "recorded from other weights: its single_mlp_out is"),
    ],
)
def test_broken_files_are_refused(golden, files, tmp_path, changes, sentence):
    _changed(files, tmp_path / "broken.npz", **changes)
    with pytest.raises(UserError) as caught:
        load_trace(tmp_path / "broken.npz", golden.pipe, golden.tcs)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 5000, -30])
def test_truncated_files_are_refused(golden, files, tmp_path, keep):
    (tmp_path / "cut.npz").write_bytes((files / "f32.npz").read_bytes()[:keep])
    with pytest.raises(UserError, match="cut.npz is damaged or no .npz file of activations"):
        load_trace(tmp_path / "cut.npz", golden.pipe, golden.tcs)


def test_objects_are_not_unpickled(golden, files, tmp_path):
    _changed(files, tmp_path / "objects.npz", velocity=np.array([{}], object))
    with pytest.raises(UserError, match="objects.npz is damaged"):
        load_trace(tmp_path / "objects.npz", golden.pipe, golden.tcs)


def test_an_absent_file_is_refused(golden, tmp_path):
    with pytest.raises(UserError, match="does not exist; make it with python -m converters.torch_trace"):
        load_trace(tmp_path / "absent.npz", golden.pipe, golden.tcs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": 4}, r"step must lie in \[0, 4\)"),
        ({"height": 50}, "multiples of"),
        ({"latents": np.zeros((2, 2))}, "must be packed, of shape"),
        ({"directory": "nowhere"}, "nowhere is not a diffusers directory"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change, sentence):
    given = {"directory": REFERENCE / "pipeline", "steps": 4} | SIZE | change
    with pytest.raises(UserError, match=sentence):
        record_activations(given.pop("directory"), PROMPTS[0], **given)
