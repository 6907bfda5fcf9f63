"""The benchmarks count what they say, and what they make is sound, made small; commands timed exist."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import typer

from converters.export import export_pipeline
from difffract_jax.circuits.frozen.replacement import prepare_step
from difffract_jax.cli.main import app
from difffract_jax.conversion import convert_flux
from difffract_jax.graphs.grade import Grade
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.pipeline import generate
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.files import TensorFile
from difffract_jax.transcoders.transcoder import FEATURE_AXES
from tolerances import TOL


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


def test_dashboards_of_flux_are_counted():
    module = benchmark("dashboards")
    found = module.measure(module.PARSER.parse_args([]))
    assert (found["sites"], found["features"]) == (76, 76 * 49_152)
    assert found["statistics on the device"] == found["features"] * found["statistics, a feature"] + 4 * 76
    fewer = module.measure(module.PARSER.parse_args(["--top", "1", "--per-third", "1"]))
    assert fewer["disk in the end"] < found["disk in the end"] < found["disk while it runs, at most"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_and_told_to_stop_ends_as_one_that_is_not(tmp_path, capsys):
    module = benchmark("preemption")
    # JAX spreads in 2 s that one process was told to stop: the run must still be going then.
    stops = module.measure(module.PARSER.parse_args(["--kills", "1", "--steps", "600", "--longest", "0.3"]), tmp_path)
    assert [(one.signal, one.processes) for one in stops] == [("SIGKILL", 2), ("SIGTERM", 2)]
    told = stops[1]
    assert 600 > told.kept == told.reached > stops[0].kept, "told to stop, it saves the step that it has reached"
    assert capsys.readouterr().out.count("| SIG") == 2


def test_the_commands_that_are_timed_have_the_options_that_they_are_given():
    main = typer.main.get_command(app)
    for timed in benchmark("commands").COMMANDS:
        if timed.name != "python":
            context = main.commands[timed.name].make_context(timed.name, list(timed.arguments))
            assert context.params["out" if "--out" in timed.arguments else "json"] is not None


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    module, home = benchmark("full_size_checkpoint"), tmp_path_factory.mktemp("fake")
    return module, home, module.make(home, module.SMALL)


def test_the_fake_checkpoint_has_the_files_of_the_published_one(fake, tmp_path):
    _, home, _ = fake
    export_pipeline(random_pipeline(), tmp_path / "exported")
    made = {path.relative_to(home / "diffusers").as_posix() for path in (home / "diffusers").rglob("*.*")}
    once = {path.relative_to(tmp_path / "exported").as_posix() for path in (tmp_path / "exported").rglob("*.*")}
    sharded = {"transformer/diffusion_pytorch_model": 3, "text_encoder_2/model": 2}
    for stem, count in sharded.items():
        once -= {f"{stem}.safetensors"}
        once |= {f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
        once |= {f"{stem}.safetensors.index.json"}
    assert made == once
    kinds = {
        info.dtype for path in home.rglob("diffusers/*/*.safetensors") for info in TensorFile(path).tensors.values()
    }
    assert kinds == {"BF16"}


def test_the_fake_checkpoint_has_the_published_number_of_parameters(fake):
    module = fake[0]
    published = {"transformer": 11_891_178_560, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480}
    counts = {
        part.folder: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(module.abstract_module(*part.module)))
        for part in module.parts(module.FULL)
    }
    assert counts | published == counts
    keys = module.source_shapes(module.FLUX_DIFFUSERS, module.abstract_module(*module.parts(module.FULL)[0].module))
    assert len(keys) == 1156


def test_the_fake_checkpoint_runs_and_no_block_is_another(fake, tmp_path):
    _, home, record = fake
    made = convert_flux(home / "diffusers", tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    assert 2 * sum(made.parameters.values()) == record["diffusers"]["bytes"]
    assert set(made.dtypes.values()) == {"bfloat16"} and pipe.config.transformer == TINY
    image = generate(pipe, "a red fox at dawn", seed=0, run=pipe.plan(steps=2)).image
    assert 20 < image.std() < 110 and 60 < image.mean() < 195  # neither grey nor black and white
    for stack in (pipe.transformer.double, pipe.transformer.single, pipe.t5.blocks, pipe.clip.blocks):
        for leaf in jax.tree.leaves(stack):
            for layer in range(1, len(leaf)):
                assert not np.array_equal(leaf[0], leaf[layer])


def test_the_fake_site_has_about_as_many_active_features_as_it_says(fake):
    module, home, record = fake
    tcs = load_transcoders(home / "transcoders", verify=True)
    assert tcs.sites.names == (record["transcoders"]["stored"],)
    one = jax.tree.map(lambda leaf: leaf[0], tcs.stacks["img"])
    x = module.INPUT_RMS * jax.random.normal(jax.random.key(0), (200, tcs.config.d_model))
    share = float(np.mean(np.asarray(one.encode(x, jax.numpy.asarray(0.5))) > 0))
    assert share == pytest.approx(record["transcoders"]["active_share"], rel=0.5)


@pytest.mark.slow
def test_the_rehearsal_encodes_traces_and_tells_what_it_took(fake):
    rehearsal, home = benchmark("full_size_run"), fake[1]
    assert rehearsal.encode_step(home) == {"prompts": 2}
    layout = TINY.layout
    tcs = rehearsal.derived(home, layout, ("img/1", "single/*"))
    first, second = (tcs.stacks[name].fetch(0) for name in ("img", "joint"))
    roll = fake[2]["transcoders"]["roll"]
    apart = len(layout.labels["img"]) + len(layout.labels["txt"]) - 1
    for path, axis in FEATURE_AXES.items():
        if path in leaf_paths(first):
            ours, theirs = (np.asarray(leaf_paths(one)[path]) for one in (second, first))
            np.testing.assert_array_equal(ours, np.roll(theirs, apart * roll, axis))
    found = rehearsal.trace_step(home, 48, ("*/*",), 3, 3)
    assert found["nodes"] == 3 and found["conservation"] <= TOL.conservation_f32
    assert found["sites"] == sum(map(len, layout.labels.values()))
    assert set(found["times"]) == {"capture", "encode sites", "attribute"}
    (home / "results").mkdir()
    rehearsal.measure("steer-small", home, rehearsal.Step(lambda _: {"what": 1}, 1), 2**34)
    told = json.loads((home / "results" / "steer-small.json").read_text())
    assert told["private peak"] > 0 and told["memory of the host"] == 16


@pytest.mark.slow
def test_the_rehearsal_converts_trains_and_checks(fake):
    rehearsal, home = benchmark("full_size_run"), fake[1]
    if not (home / "embeddings.npz").exists():
        rehearsal.encode_step(home)
    assert rehearsal.convert_step(home)["parameters"] > 0 and not (home / "converted").exists()
    assert rehearsal.validate_step(home)["holds"]
    assert rehearsal.train_step(home, 2)["steps"] == 2
    assert rehearsal.features_step(home)["sites"] == 4 and rehearsal.heads_step(home)["heads"] > 0
    assert rehearsal.steer_step(home)["image spread"] > 0


def test_an_interrupted_fake_checkpoint_is_continued(fake, tmp_path):
    module, home, _ = fake
    said = []
    victim = home / "diffusers" / "text_encoder_2" / "model-00002-of-00002.safetensors"
    whole = victim.read_bytes()
    victim.unlink()
    victim.with_name(f".{victim.name}.partial").write_bytes(whole[:100])
    module.make(home, module.SMALL, say=said.append)
    assert victim.read_bytes() == whole
    assert [text for text in said if "is written" in text] == [f"{victim} is written, {len(whole):,} bytes"]
    assert not list(home.rglob("*.partial"))


def test_the_tables_of_the_verdict_count_edits():
    """Three targets: the first's held-out edits work with both seeds, the second's with one, the third's never."""
    module = benchmark("verdict")

    def target(number, values):
        usual = {"predicted": 0.2, "control": 0.01, "live": 0.2, "distance": 0.5, "size": 1}
        held = [
            {"predicted": 0.2, "size": size, "dose": -1.0} | dict(zip(module.HELD, values, strict=True))
            for size in (1, 2)
        ]
        edits = [
            *(usual | {"dose": dose, "full": 0.2, "other": [0.2, -0.2]} for dose in (0.5, 1.0)),
            usual | {"dose": 2.0, "full": 0.01, "other": None, "distance": 1.5},
            usual | {"dose": 1.0, "full": -0.2, "other": None, "size": 8},
        ]
        alone = 0.2 if number == 0.5 else 1.0
        grade = Grade(number=number, alone=alone, other_seeds=number, limit=0.02)
        return {"grade": to_json_values(grade), "held out": held, "edits": edits}

    rows = [target(0.9, (0.2, 0.2)), target(0.4, (0.2, -0.2)), target(0.5, (0.0, 0.9))]
    criterion, own, _, each, _ = module.outcomes(rows)
    assert (criterion["works"], criterion["area"], own["area"]) == ("2 of 3", "0.500", "1.000")
    assert (each["works"], each["area"]) == ("3 of 6", "0.722")
    told = {row["what"]: row["figure"] for row in module.hypotheses(rows)}
    assert told["single edits that work, doses -1 to 1"] == "1.00 of 6"
    assert told["single edits that work with other seeds"] == "0.50 of 12"
    assert told["groups of 8 and more"] == "0.00 of 3"
    assert told["single edits that leave the run's own activations, doses -2 and 2"] == "1.00"
    assert module.figure(rows).axes


@pytest.mark.slow
def test_what_a_host_feeds_is_measured_on_a_small_shape(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    host, checkpoint = benchmark("host_input"), benchmark("full_size_checkpoint")
    rates = host.flux(checkpoint.SMALL, repeats=1, chunks=1, count=400)
    assert rates["together"] < min(rates["reading"], rates["tokenising and choosing rows"])
    assert rates["tokenising and choosing rows"] > 0 and {"which prompt comes", "choosing rows"} <= rates.keys()
    encoding = host.text(checkpoint.SMALL, repeats=1)
    assert encoding["together"] < min(encoding["CLIP"], encoding["T5, of 2 layers"])
    taken = host.consumed()
    assert taken["as modelled, bound by network"] < taken["products alone"]


@pytest.mark.slow
def test_trainings_with_and_without_overlap_are_timed_and_learn_the_same():
    small = {"steps": 24, "batch": 64, "buffer_rows": 1024, "expansion": 2, "k": 4, "sites": ("img/0",)}
    record = benchmark("training").overlapped(1, **small)
    assert set(record["steps"]) == {"buffer on the device", "buffer on the host", "rows from files"}
    assert all(row["same"] and row["on, s"] > 0 for row in record["steps"].values())
