"""Every model that the package takes: what holds for each, on diffusers' own small pipelines and at its full size.

1. `generate`: an image of the run that the model takes by default, from the same noise, against diffusers' pipeline in
   float32: largest difference in grey levels of 255, and the 2-norm of the latents' difference over theirs.
2. `bf16`: 2-norm of the error that bfloat16 makes, over that of diffusers' float32; beside it diffusers' own. Of one
   evaluation of the transformer on the same inputs, and of the latents after the run.
3. `coverage`: keys and shapes that the converter's table reads and writes are those of diffusers' module on the meta
   device, built from the published configuration, and so is the preset.
4. `conservation`: the largest |sum of edges + bias - value| over the sum of absolute edges, of one feature of every
   group of sites and of an output; of one step, and of all steps of the default run, with both branches where guidance
   has two.
5. `edge = intervention`: sources of two steps (and both branches) are doubled in the affine map; largest difference of
   effect and edge, over the target's sum of absolute edges.
6. `training`: rows that the sampler takes against what enters and leaves diffusers' own MLPs in the same runs, for
   sites whose MLPs are modules there; and one step of transcoders at every site against PyTorch's gradient in float64:
   relative error of the loss, and of the change of the weights.
7. `at rest`: bytes of all weights in bfloat16, and the transformer's alone.
8. `smallest device`: the smallest memory of a GPU that `difffract plan` says suffices for 1024 px, with the weights
   resident and streamed.

    python benchmarks/models.py [--only flux2-klein] [--json] [--kept docs/figures/models.json] [--page docs/models.md]

All but 3, 7 and 8 are of tiny random weights. `--page` writes the tables into a page, between its marks. `--kept` keeps
each model's figures in a file as soon as they are measured; those that are there are not measured again.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diffusers  # noqa: E402  (the tests' small pipelines and laws, after the path above)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from difffract_jax.circuits.attribution.engine import make_engine  # noqa: E402
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target  # noqa: E402
from difffract_jax.circuits.trace.capture import capture_steps  # noqa: E402
from difffract_jax.cli.main import app  # noqa: E402
from difffract_jax.estimate.weights import weights_needed  # noqa: E402
from difffract_jax.loading import load_pipeline, pipeline_shapes  # noqa: E402
from difffract_jax.models.mmdit import Inputs  # noqa: E402
from difffract_jax.models.pipeline import encode, generate  # noqa: E402
from difffract_jax.models.presets import PRESETS  # noqa: E402
from difffract_jax.storage.files import atomic_file  # noqa: E402
from difffract_jax.transcoders.harvest import Sampler  # noqa: E402
from difffract_jax.transcoders.objective import ActivationRows  # noqa: E402
from difffract_jax.transcoders.prompts import PromptWorld  # noqa: E402
from difffract_jax.transcoders.sites import parse_sites  # noqa: E402
from difffract_jax.transcoders.state import init_params, init_state, measure_moments  # noqa: E402
from difffract_jax.transcoders.step import Recipe, optimizer, train_step  # noqa: E402
from difffract_jax.transcoders.transcoder import TranscoderConfig  # noqa: E402
from laws import last_targets, steps_conserved, steps_intervened  # noqa: E402
from model_kinds import (  # noqa: E402
    KINDS,
    Kind,
    coverage,
    draw_noise,
    run_theirs,
    small_run,
    watch_mlps,
)
from steps_by_hand import step_by_hand, weights_of  # noqa: E402
from tolerances import relative_error  # noqa: E402
from traces import make_transcoders  # noqa: E402

PROMPTS = ("a red fox", "a blue cat")
PIXELS = "pixels:color=red,minus=blue,box=8,8,24,20"
TIME = 0.8
SPARSITY = 0.01
GIGABYTES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
PLANNED = ("generate", "trace")
"""Commands whose smallest device is looked for."""
Row = dict[str, Any]
"""Name of a figure -> its value."""


def images(kind: Kind, home: Path, steps: int | None = None) -> Row:
    """Compares an image and latents with diffusers', in float32 and bfloat16; arguments as for `laws`."""
    pipe = load_pipeline(home)
    run, noise = small_run(pipe, kind, steps), draw_noise(pipe, kind)
    theirs = run_theirs(kind.pipeline(), run, PROMPTS[0], noise)
    made = generate(pipe, PROMPTS[0], run=run, latents=noise)
    levels = np.abs(made.image.astype(int) - np.round(255 * theirs.pixels).astype(int))
    given = load_pipeline(home, dtype=jnp.bfloat16)
    ours16 = generate(given, PROMPTS[0], run=run, latents=noise).latents
    theirs16 = run_theirs(kind.pipeline().to(torch.bfloat16), run, PROMPTS[0], noise).latents
    assert np.allclose(theirs.times, run.sigmas[:-1], rtol=1e-6), "both must feed the same times"
    return {
        "steps": run.steps,
        "branches": run.branches,
        "grey levels": int(levels.max()),
        "latents": relative_error(made.latents, theirs.latents),
        "latents, bf16": relative_error(np.asarray(ours16, np.float32), theirs.latents),
        "latents, diffusers' bf16": relative_error(theirs16, theirs.latents),
    }


def evaluations(kind: Kind, home: Path) -> Row:
    """Compares one evaluation of the transformer with diffusers', in float32 and bfloat16."""
    pipe, wide = load_pipeline(home), kind.pipeline().transformer
    config = pipe.config.transformer
    guidance = 3.5 if config.guidance else None
    rng = np.random.default_rng(0)
    noise = draw_noise(pipe, kind)
    text = kind.draw_text(rng, kind.text_tokens, config.text_width)
    pooled = rng.standard_normal(config.pooled_width).astype(np.float32)
    grid = small_run(pipe, kind).grid
    given = (noise, text, pooled, TIME, grid, guidance)
    theirs = kind.evaluate(wide, *given)
    theirs16 = kind.evaluate(wide.to(torch.bfloat16), *given)
    inputs = Inputs(*map(jnp.asarray, (noise, text, pooled)), jnp.float32(TIME), guidance and jnp.float32(guidance))
    velocity = jax.jit(type(pipe.transformer).__call__, static_argnums=2)
    ours = velocity(pipe.transformer, inputs, grid)
    ours16 = velocity(load_pipeline(home, dtype=jnp.bfloat16).transformer, inputs, grid)
    return {
        "velocity": relative_error(ours, theirs),
        "velocity, bf16": relative_error(np.asarray(ours16, np.float32), theirs),
        "velocity, diffusers' bf16": relative_error(theirs16, theirs),
    }


def converted(kind: Kind, name: str) -> Row:
    """Checks the converter's table against diffusers' module at full size."""
    found = coverage(kind)
    fits = not found.problems and found.same and len(set(found.numbers)) == 1
    return {
        "tensors": found.tensors,
        "numbers": found.numbers[0],
        "covered": fits,
        "preset": kind.read(kind.published) == PRESETS[name],
    }


def laws(kind: Kind, home: Path, dtype: Any, steps: int | None = None) -> Row:
    """Measures conservation, of one step and of all, and edges against interventions.

    Args:
        kind: the model.
        home: the small pipeline.
        dtype: of everything.
        steps: denoising steps of the run; the model's own if left out.
    """
    pipe = load_pipeline(home, dtype=dtype)
    layers = parse_sites(["*/*"], pipe.config.transformer.layout).groups
    tcs = make_transcoders(pipe.config.transformer, **layers, skip=True, dtype=dtype)
    run = small_run(pipe, kind, steps)
    word, row = "float32" if dtype == jnp.float32 else "float64", {}
    for name, first in (("one step", 1), ("two steps", 0), ("all steps", None)):
        last = run.steps - 1 if first is None else 1
        span = capture_steps(pipe, tcs, PROMPTS[0], first=first or 0, last=last, run=run)
        engine = make_engine(span, tcs, (resolve_target(pipe, span, parse_target(PIXELS)),))
        rows = last_targets(engine)
        conserved, found = steps_conserved(engine, rows)
        if name == "two steps":
            row[f"intervention, {word}"], _ = steps_intervened(engine, rows, found, each=1)
        else:
            row[f"conservation, {name}, {word}"] = conserved
    return row | {"traced steps": run.steps, "traced evaluations": run.steps * run.branches}


def training(kind: Kind, home: Path) -> Row:
    """Compares rows with diffusers' MLPs, and a training step with PyTorch's."""
    pipe = load_pipeline(home)
    run = small_run(pipe, kind, 2)
    negative = None if run.branches == 1 else encode(pipe, run.negative_prompt, run.text_tokens)
    sites = parse_sites(["*/*"], pipe.config.transformer.layout)
    prompts = PromptWorld(lambda number: PROMPTS[number % 2], "train", 0.0)
    sampler = Sampler(pipe, sites, run, prompts, seed=3, prompts_at_once=2, negative=negative)
    chunk, theirs = sampler.chunk(0), kind.pipeline()
    seen = watch_mlps(theirs, kind)
    for number in range(2):
        run_theirs(theirs, run, sampler.prompts(number), np.asarray(sampler.noise(np.array([number]))[0]))
    taken = {name: jax.tree.map(np.asarray, rows) for name, rows in chunk.rows.items()}
    kept = {name: ActivationRows(r.x[:, v], r.y[:, v], r.t[v]) for name, r, v in _filled(taken, chunk.valid)}
    errors = []
    for group, numbers in sites.members:
        for place, number in enumerate(numbers):
            site = f"{group.label}/{number}"
            if site in seen:
                errors.append(_distance(kept[group.name].x[place], kept[group.name].y[place], seen[site]))
    return {"rows": max(errors), "sites": len(sites.names)} | _stepped(kept)


def _filled(taken: dict[str, Any], valid: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, rows, np.flatnonzero(valid[name])) for name, rows in taken.items()]


def _distance(x: np.ndarray, y: np.ndarray, seen: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Returns the error of rows against those that are nearest among diffusers', which come in another order."""
    theirs = [np.concatenate(arrays).astype(np.float64) for arrays in zip(*seen, strict=True)]
    apart = np.square(x).sum(1)[:, None] - 2 * x @ theirs[0].T + np.square(theirs[0]).sum(1)[None]
    nearest = np.argmin(apart, axis=1)
    # Where neither time nor latents enter, the rows of a prompt are the same in every step.
    assert np.unique(nearest).size == len(np.unique(x, axis=0)), "every row must be a row of diffusers' MLP"
    return max(relative_error(x, theirs[0][nearest]), relative_error(y, theirs[1][nearest]))


def _stepped(kept: dict[str, ActivationRows]) -> Row:
    """Takes one step at all sites, as many rows of each, and the same by hand."""
    count = min(rows.t.size for rows in kept.values())
    cut = [(r.x[:, :count], r.y[:, :count], np.broadcast_to(r.t[:count], (len(r.x), count))) for r in kept.values()]
    rows = ActivationRows(*(jnp.asarray(np.concatenate(parts)) for parts in zip(*cut, strict=True)))
    config = TranscoderConfig(d_model=rows.x.shape[-1], features=64, time_embed=8)
    recipe, moments = Recipe(lr=1e-2, eps=1e-4), measure_moments(rows, scaled=True)
    params = init_params(jax.random.key(0), config, "tied", moments)
    state = init_state(params, optimizer(recipe), moments, jnp.full(len(rows.x), SPARSITY))
    after, metrics = jax.jit(partial(train_step, recipe=recipe))(state, rows)
    first, second, losses, changes = weights_of(params), weights_of(after.params), [], []
    for site in range(len(rows.x)):
        before = {name: leaf[site] for name, leaf in first.items()}
        x, y = rows.x[site] / moments.x_scale[site], rows.y[site] / moments.y_scale[site]
        loss, expected = step_by_hand(before, x, y, rows.t[site], SPARSITY, recipe)
        losses.append(relative_error(metrics.loss[site], loss))
        moved = [np.concatenate([(w[n] - before[n]).ravel() for n in before]) for w in (_site(second, site), expected)]
        changes.append(relative_error(*moved))
    finite = bool(np.all(np.isfinite(metrics.loss)))
    return {"loss": max(losses), "change": max(changes), "finite": finite}


def _site(weights: dict[str, np.ndarray], site: int) -> dict[str, np.ndarray]:
    return {name: leaf[site] for name, leaf in weights.items()}


def at_rest(name: str) -> Row:
    """Counts the bytes of the weights in bfloat16."""
    parts = weights_needed(pipeline_shapes(name), jnp.bfloat16)
    return {"bytes": sum(parts.values()), "bytes of the transformer": parts["transformer"]}


def smallest_devices(name: str) -> Row:
    """Asks `difffract plan` for the smallest GPU of every command and way."""
    devices = [word for size in GIGABYTES for word in ("--device", f"{size}GB")]
    row: Row = {}
    for command in PLANNED:
        answer = CliRunner().invoke(app, ["plan", command, name, *devices, "--json"], catch_exceptions=False)
        for way in ("resident", "streamed"):
            found = [one for one in json.loads(answer.stdout)["counted"] if one["weights"] == way and one["fits"]]
            row[f"{command}, {way}"] = found[0]["device"] if found else f"above {GIGABYTES[-1]}GB"
    return row


def measure(name: str, say: Callable[[str], None] = lambda text: None, steps: int | None = None) -> Row:
    """Measures a model: every figure of its rows.

    Args:
        name: of `KINDS`.
        say: told what is being measured.
        steps: denoising steps of a run; the model's own if left out.
    """
    kind, row = KINDS[name], {"model": name}
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        home = Path(folder)
        kind.pipeline().save_pretrained(home)
        for part, given in ((images, (steps,)), (evaluations, ()), (laws, (jnp.float32, steps)), (training, ())):
            begin = time.perf_counter()
            row |= part(kind, home, *given)
            say(f"{name}: {part.__name__}, {time.perf_counter() - begin:.0f} s")
        with jax.enable_x64(True):
            row |= laws(kind, home, jnp.float64, steps)
    return row | converted(kind, name) | at_rest(name) | smallest_devices(name)


def measure_all(names: Sequence[str], kept: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measures models in turn.

    Args:
        names: of `KINDS`.
        kept: JSON file of figures by model, which need not be there; None to measure all and keep nothing.
        say: told what is being measured.
    """
    there = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.exists() else {}
    for name in names:
        if name not in there:
            there[name] = measure(name, say)
            if kept is not None:
                with atomic_file(kept) as file:
                    file.write_text(json.dumps(there, indent=2), encoding="utf-8")
    return [there[name] for name in names]


def shown(row: Row) -> list[dict[str, str]]:
    """Returns the cells of a model, one dictionary per table."""
    evaluated = f"{row['steps']} steps" + (", 2 branches" if row["branches"] == 2 else "")
    number = lambda key: f"{row[key]:.1e}"  # noqa: E731  (one use)
    pair = lambda *keys: " / ".join(map(number, keys))  # noqa: E731
    covered = "equal" if row["covered"] and row["preset"] else "DIFFERS"
    made = {
        "model": row["model"],
        "run": evaluated,
        "image, grey levels": str(row["grey levels"]),
        "latents, float32": number("latents"),
        "one evaluation, float32": number("velocity"),
        "one evaluation, bf16: ours / diffusers'": pair("velocity, bf16", "velocity, diffusers' bf16"),
        "latents of the run, bf16: ours / diffusers'": pair("latents, bf16", "latents, diffusers' bf16"),
        "converter": f"{covered}, {row['tensors']:,} tensors, {row['numbers']:,} numbers",
    }
    held = {
        "model": row["model"],
        "conservation, one step: float32 / float64": pair(
            "conservation, one step, float32", "conservation, one step, float64"
        ),
        "conservation, all steps: float32 / float64": pair(
            "conservation, all steps, float32", "conservation, all steps, float64"
        ),
        "of": f"{row['traced steps']} steps, {row['traced evaluations']} evaluations",
        "edge = intervention: float32 / float64": pair("intervention, float32", "intervention, float64"),
        "rows of MLPs": number("rows"),
        "training step: loss / change": pair("loss", "change") + ("" if row["finite"] else ", NOT FINITE"),
    }
    needed = {
        "model": row["model"],
        "at rest in bf16, GB": f"{row['bytes'] / 1e9:.2f}",
        "of which transformer": f"{row['bytes of the transformer'] / 1e9:.2f}",
    }
    ways = {f"{command}, {way}": row[f"{command}, {way}"] for command in PLANNED for way in ("resident", "streamed")}
    return [made, held, needed | ways]


def tables(rows: Sequence[Row]) -> str:
    """Returns the tables of some models in Markdown."""
    cells, made = [shown(row) for row in rows], []
    for number in range(len(cells[0])):
        lines = [
            list(cells[0][number]),
            ["---"] * len(cells[0][number]),
            *(list(one[number].values()) for one in cells),
        ]
        made.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(made)


def settings() -> str:
    """Returns what was run, where and when."""
    flags = f"XLA_FLAGS={os.environ['XLA_FLAGS']}; " if os.environ.get("XLA_FLAGS") else ""
    versions = ", ".join(f"{one.__name__} {one.__version__}" for one in (jax, diffusers, torch))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"`python benchmarks/models.py`, {time.strftime('%Y-%m-%d', time.gmtime())}; {machine}; {flags}{versions}."


def write_page(page: Path, text: str) -> None:
    """Puts tables into a page between its marks, which must be there.

    Args:
        page: Markdown file.
        text: what shall stand there.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- tables -->\n")
    _, end, after = rest.partition("<!-- end of tables -->")
    if not mark or not end:
        sys.exit(f"{page} lacks the marks <!-- tables --> and <!-- end of tables -->; put both on lines of their own.")
    with atomic_file(page) as file:
        file.write_text(f"{before}{mark}{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Measures the models and prints, or writes, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="models to measure; all if left out")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of the tables")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="figures of models that were measured before")
    parser.add_argument("--page", type=Path, help="a page with marks, into which the tables are written too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or list(KINDS)
    rows = measure_all(names, options.kept, partial(print, file=sys.stderr, flush=True))
    left = [name for name in KINDS if name not in names]
    text = f"{settings()}\n\n{tables(rows)}" + (f"\n\nNot measured: {', '.join(left)}." if left else "")
    print(json.dumps(rows, indent=2) if options.json else text)
    if options.page is not None:
        write_page(options.page, text)


if __name__ == "__main__":
    main()
