"""The command that holds a saved graph against its model: `validate`, for `cli.py`.

It follows the rules of `cli.py`: settings in, artefacts and a short table out; progress on stderr; imports when it
runs.
"""

from typing import Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.preflight import check_graph_fits, known_of, loras_of
from difffract_jax.cli.runs import torch_latents
from difffract_jax.cli.settings import RerunSettings, ValidateConfig
from difffract_jax.cli.steer import check_directory
from difffract_jax.config import UserError, provenance


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(validate)


@opt.command(
    ValidateConfig,
    arguments=("model", "transcoders", "graph"),
    before={"out": ("latents", "noise", "activations")},
    fills="out",
)
def validate(settings: ValidateConfig, *, json: bool) -> None:
    """Hold a graph against the model it explains: what is exact to rounding, and what the real model makes of the rest.

    The graph's run is captured anew. Exact, and held to bars: the replacement gives the model's activations at the
    trace, edges and bias add up to every pre-activation, an edge is what taking its source away does in the frozen
    model. A bar that is missed ends the command with status 1, after the report is written.

    Measured, without a bar: the most influential features are taken off one at a time in the real model, and the
    changes downstream correlated with the graph's predictions; circuits of growing size are kept alone (`recovered`) or
    removed (`lost`), beside as many features of the largest values, and at random. That is most of the time: --draws
    and --readings make it less.

    --grade FILE tries edits besides, single ones and groups, at doses from -2 to 2, and says in words what the graph's
    predictions of them are worth; FILE is the graph with its grade, which pages and summaries then show.

    Example: `difffract validate organism organism graph.npz --out validation`
    """
    if settings.out is not None:
        check_directory(settings.out)
    if settings.grade is not None:
        opt.check_out(settings.grade, ".npz")
    from difffract_jax.circuits.checks.report import write_validation
    from difffract_jax.circuits.checks.summaries import at_size, own_figures
    from difffract_jax.circuits.checks.validation import failed_checks
    from difffract_jax.circuits.checks.validation import validate as hold
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.cli.used import load_for_graph

    graph = read(settings.graph)
    check_graph_fits("validate", settings, graph)
    pipe, place = open_model("validate", settings, **known_of(graph) | loras_of(graph, settings.lora))
    tcs = load_for_graph(settings.transcoders, pipe.config.transformer.layout, graph, weights=place)
    again = rerun(pipe, tcs, graph, settings)
    asked = settings.model_dump(include={"edges", "ablations", "ablation", "draws", "seed"})
    with progress("Validating") as advance:
        found = hold(again, graph, **asked, readings=tuple(settings.readings.split(",")), progress=advance)
    if settings.grade is not None:
        found["grade"] = _graded(pipe, tcs, again, graph, settings, found)
    record = provenance("validate", settings, **opt.sources(model=pipe, transcoders=tcs))
    files = {}
    if settings.out is not None:
        with replacing(settings.out):
            files = write_validation(found, settings.out, record)
    size = found["completeness"]["pruned"]
    if json:
        shown = {key: value for key, value in found["perturbation"].items() if key != "pairs"}
        emit(files | record | found | {"perturbation": shown}, as_json=True)
    else:
        own = {"the target itself": own_figures(found)}
        if settings.grade is not None:
            own |= {"grade": found["grade"]["words"], "edits tried in the real model": found["grade"]["parts"]}
        emit(own | _brief(found, at_size(found, size)) | ({"report": files["report.md"]} if files else {}))
    missed = failed_checks(found)
    if missed:
        raise UserError(missed)


def rerun(pipe: Any, tcs: Any, graph: Any, settings: RerunSettings) -> Any:
    """Returns a graph's run, captured anew or taken from the file of activations that it was made of.

    Args:
        pipe: the pipeline it was traced in.
        tcs: the transcoders it was traced with.
        graph: the graph.
        settings: which say where its starting noise comes from.
    """
    from difffract_jax.circuits.checks.rerun import capture_again, check_same

    check_same(pipe, tcs, graph)
    run = graph.provenance.traced_run
    if settings.activations is not None:
        if settings.latents is not None or settings.noise is not None:
            raise UserError(f"{settings.activations} brings the latents of its step; leave out latents and noise.")
        from difffract_jax.circuits.trace.imported import load_trace

        padding = run.include_padding
        return capture_again(
            pipe, tcs, graph, trace=load_trace(settings.activations, pipe, tcs, include_padding=padding)
        )
    traced = graph.provenance.settings or {}
    if traced.get("activations"):
        raise UserError(
            f"The graph was traced from the activations in {traced['activations']}; give that file with --activations."
        )
    return capture_again(pipe, tcs, graph, latents=given_latents(pipe, graph, settings))


def given_latents(pipe: Any, graph: Any, settings: RerunSettings) -> Any:
    """Returns the packed starting noise that a graph's run is given; None where its seed draws it.

    Args:
        pipe: the pipeline it was traced in.
        graph: the graph.
        settings: which say where the noise comes from.
    """
    run, traced = graph.provenance.traced_run, graph.provenance.settings or {}
    if settings.latents is not None:
        from difffract_jax.storage.files import read_array

        return read_array(settings.latents)
    if run.latents_given and (settings.noise or traced.get("noise")) == "torch" and not traced.get("latents"):
        return torch_latents(pipe, run.grid, [run.seed])[0]
    return None


def _graded(pipe: Any, tcs: Any, again: Any, graph: Any, settings: ValidateConfig, found: dict[str, Any]) -> Any:
    """Grades the graph, and writes it with its grade; returns what the report shows."""
    from difffract_jax.circuits.checks.grade_report import grade_values
    from difffract_jax.circuits.checks.grading import grade
    from difffract_jax.circuits.checks.summaries import at_size
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.output import replacing

    assert settings.grade is not None
    size, circuit = found["completeness"]["pruned"], None
    for row in at_size(found, size):
        if (row["reading"], row["ranking"]) == ("full", "influence"):
            circuit = {name: row[name] for name in ("recovered", "lost")}
    reproducible = settings.activations is None
    with progress("Grading") as advance:
        made, tried = grade(
            pipe,
            tcs,
            again,
            graph,
            seed=settings.seed,
            latents=given_latents(pipe, graph, settings) if reproducible else None,
            reproducible=reproducible,
            circuit=circuit,
            progress=advance,
        )
    # To put the grade into the graph's own file is what was asked for, and nothing of the graph is lost.
    with replacing(*([] if settings.grade == settings.graph else [settings.grade]), option="--grade"):
        graph.with_provenance(grade=made).save(settings.grade)
    return grade_values(made, tried)


def _brief(found: dict[str, Any], circuits: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what fits a terminal; the files hold all."""
    tests = [
        {"exact": row["check"], "worst": row["worst"], "median": row["median"]}
        | {"checked": f"{row['checked']} of {row['of']}", "bar": row["bar"], "holds": "yes" if row["holds"] else "NO"}
        for row in found["exactness"]
    ]
    changes = [
        {key: "-" if value is None else value for key, value in row.items()} for row in found["perturbation"]["rows"]
    ]
    kept = [{key: "-" if value is None else value for key, value in row.items()} for row in circuits]
    ablated = {"mean": "means over positions", "zero": "zeros"}[found["completeness"]["ablation"]]
    return {
        "features taken off": found["perturbation"]["ablated"],
        "features outside a circuit become": ablated,
        "exact in the frozen model": tests,
        "correlations with the real model": changes,
        "the pruned circuit, kept alone and removed": kept,
    }
