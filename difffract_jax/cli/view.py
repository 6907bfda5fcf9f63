"""The commands that show a graph: `view`, one page that a browser opens from disk, and `report`; for `main.py`.

They follow its rules. Weights are needed for the image of the run alone, which is made once and kept beside the graph.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.settings import ReportConfig, ShownGraph, ViewConfig
from difffract_jax.config import UserError


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(view)
    app.command()(report)


@opt.command(ViewConfig, arguments=("graph",), layers=())
def view(settings: ViewConfig, *, json: bool) -> None:
    """Show a graph: one file that a browser opens from disk, without a network.

    Rows are blocks, columns the prompt's words and the image's columns. Point at a node to see where it is active, at
    the image or a word to see its nodes; click for the edges. Prune, pin, group and name, and save that as a
    `.groups.json`, which `prune`, `steer` and `export` read. With --serve, Save writes it beside the graph.

    Example: `difffract view graph.npz`, then open graph.html
    """
    out = settings.out or settings.graph.with_suffix(".html")
    if not settings.serve:
        opt.check_out(out, ".html")
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.dashboards.render import write_report
    from difffract_jax.dashboards.viewer_page import viewer_page

    whole = read(settings.graph)
    shown, parts = _parts(whole, settings)
    if settings.serve:
        return _serve(whole, shown, parts, settings)
    page = viewer_page(shown, parts)
    with replacing(out):
        write_report(out, page)
    told = {"page": str(out), "nodes": int(shown.node_kind.size), "edges": int(shown.edge_source.size)}
    emit(
        told | {"size": f"{len(page.encode()) / 1e6:.2f} MB", "image": _about_images(parts.images, parts.image_note)},
        as_json=json,
    )


def _about_images(images: Any, note: str) -> str:
    """Says which images of the run are shown, or why none is."""
    steps = [image.step for image in images if image.step is not None]
    predicted = f", and as step {', '.join(map(str, steps))} predicted it" if steps else ""
    return f"finished{predicted}" if images else note


def _parts(whole: Any, settings: ViewConfig) -> tuple[Any, Any]:
    """Returns the graph that the page shows, and all that it shows beside it."""
    from difffract_jax.cli.graph_files import read
    from difffract_jax.dashboards.page_data import Limits, leads_forward, shown_graph
    from difffract_jax.dashboards.page_labels import grouped, labels_of
    from difffract_jax.dashboards.viewer_page import PageParts
    from difffract_jax.graphs.combine import difference

    groups = _opened_groups(whole, settings)
    limits = Limits(settings.max_nodes, settings.max_links)
    how = {"by_position": settings.by_position, "limits": limits}
    shown = grouped(shown_graph(whole, **how, name=str(settings.graph)))
    other = between = None
    other_images: Any = ()
    labels = labels_of(whole, settings.labels)
    if settings.compare is not None:
        if settings.by_position:
            raise UserError("Two graphs are compared as sums over positions; leave --by-position out.")
        second = read(settings.compare)
        other, between = shown_graph(second, **how, name=str(settings.compare)), difference(whole, second)
        between = between if leads_forward(between) else None  # of sums over positions, which may run in circles
        labels = labels_of(second, settings.labels) | labels  # the second has features that the first lacks
        other_images, _ = images_of(second, settings.model_copy(update={"graph": settings.compare, "image": None}))
    pages = None if settings.pages is None else _pages_address(settings)
    images, note = images_of(whole, settings)
    return shown, PageParts(
        name=settings.graph.stem,
        title=_title(shown, settings.graph, other),
        labels=labels,
        images=images,
        image_note=note,
        groups=groups,
        pages=pages,
        other=other,
        other_images=other_images,
        other_title="" if other is None else _title(other, settings.compare, other),
        difference=between,
    )


def _groups_path(settings: ViewConfig) -> Path:
    """Returns where a served page saves its groups."""
    from difffract_jax.graphs.groups import SUFFIX

    return settings.groups or settings.graph.with_name(settings.graph.stem + SUFFIX)


def _opened_groups(whole: Any, settings: ViewConfig) -> Any:
    """Returns the groups that a page opens with; a served one with those that it would save over, if there are any."""
    from difffract_jax.graphs.groups import read_groups

    if not settings.serve:
        return None if settings.groups is None else read_groups(settings.groups, whole)
    path = _groups_path(settings)
    if not path.exists():
        opt.check_out(path, ".json")
        return None
    try:
        return read_groups(path, whole)
    except UserError as error:
        if settings.groups is not None:
            raise
        raise UserError(f"{error} The page would save over it; name another file with --groups, or move it.") from None


def _title(graph: Any, path: Path | None, other: Any) -> str:
    """Returns what a page is called: what its graph explains; with two, the names of the files too."""
    from difffract_jax.graphs.names import node_name

    named = node_name(graph, graph.target)
    return named if other is None or path is None else f"{path.name}: {named}"


def _pages_address(settings: ViewConfig) -> str:
    """Returns where a feature's page is, as seen from the page: a path, or an address of the server."""
    assert settings.pages is not None
    if not (settings.pages / "index.html").is_file():
        raise UserError(f"{settings.pages} has no index.html; give the folder that `difffract dashboards` wrote.")
    folder = (settings.out or settings.graph).resolve().parent
    base = "pages" if settings.serve else quote(Path(os.path.relpath(settings.pages.resolve(), folder)).as_posix())
    return f"{base}/index.html#{{feature}}"


def images_of(graph: Any, settings: ShownGraph) -> tuple[Any, str]:
    """Returns the images to show, and a sentence if there are none.

    Args:
        graph: as it was read.
        settings: which may name an image, or the model to make it with.
    """
    from difffract_jax.dashboards import image_files

    if settings.image is not None:
        return [image_files.shown(image_files.read_image(settings.image))], ""
    run = graph.provenance.run
    if run is None:
        return [], "The file does not tell a run of one prompt, so there is no image; give one with --image FILE."
    key, path = _run_key(graph), image_files.kept_path(settings.graph)
    kept = image_files.read_kept(path, key)
    if kept is None:
        model = settings.model or _model_at_hand(graph)
        if model is None:
            return [], "The graph's model is not at hand, so there is no image; give --image FILE, or --model MODEL."
        if run.latents_given:
            return (
                [],
                "The run started from noise that was given, so there is no image; give one with --image FILE.",
            )
        try:
            kept = _made(graph, model)
        except UserError as error:
            if settings.model is not None:
                raise
            return [], str(error)  # the embedded model of another release, say; the graph can be shown all the same
        try:
            image_files.keep(kept, path, key)
        except OSError as error:
            sys.stderr.write(f"Note: the image could not be kept beside the graph ({error.strerror}).\n")
    return image_files.shown_images(kept), ""


def _run_key(graph: Any) -> str:
    """Returns what tells the images of one run from those of another."""
    from difffract_jax.graphs.json_values import to_json_values

    run, steps = graph.provenance.run, graph.provenance.steps
    return repr(to_json_values([run.model, run.prompt, run.seed, run.sigmas, run.grid, run.guidance, steps]))


def _model_at_hand(graph: Any) -> str | None:
    """Returns the name of the model that a graph was traced in, if it is the embedded one."""
    named = (graph.provenance.settings or {}).get("model")
    return "organism" if named == "organism" or graph.provenance.command == "demo" else None


def _made(graph: Any, model: str) -> Any:
    """Makes the images of a graph's run."""
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import progress
    from difffract_jax.config import GenerateConfig
    from difffract_jax.dashboards.image_files import KeptImages
    from difffract_jax.dashboards.run_images import run_images

    run, steps = graph.provenance.run, tuple(graph.provenance.steps or (graph.provenance.run.step,))
    pipe = open_model("generate", GenerateConfig.model_validate({"model": model, "prompt": run.prompt})).pipe
    with progress("Making the image") as advance:
        return KeptImages(run_images(pipe, run, steps, advance), steps)


def _serve(whole: Any, shown: Any, parts: Any, settings: ViewConfig) -> None:
    """Serves the page until it is interrupted."""
    from difffract_jax.dashboards.page_server import PageServer
    from difffract_jax.dashboards.viewer_page import viewer_page
    from difffract_jax.graphs.groups import check_about, parse_groups, write_groups

    path = _groups_path(settings)

    def save(text: str) -> str:
        groups = parse_groups(text, "What the page sent")
        check_about(groups, whole, "What the page sent")
        write_groups(groups, path)
        return f"Saved as {path.name}."

    server = PageServer(
        lambda token: viewer_page(shown, parts._replace(token=token)), save, port=settings.port, pages=settings.pages
    )
    typer.echo(f"Open {server.address} in a browser on this machine; groups are saved as {path}. Ctrl+C ends.")
    sys.stdout.flush()
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


@opt.command(ReportConfig, arguments=("graph",), layers=())
def report(settings: ReportConfig, *, json: bool) -> None:
    """Write a report of a graph: image, what adds up to the target, the circuit, its features; one file, to send on.

    What `difffract validate --out` and `difffract steer --out` wrote for the graph can be put in too.

    Example: `difffract report graph.npz --validation validation --edit steered --out report.html`
    """
    opt.check_out(settings.out, ".html")
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.dashboards.graph_report import graph_report
    from difffract_jax.dashboards.page_labels import labels_of
    from difffract_jax.dashboards.render import write_report
    from difffract_jax.graphs.groups import read_groups

    graph = read(settings.graph)
    groups = None if settings.groups is None else read_groups(settings.groups, graph)
    images, note = images_of(graph, settings)
    page = graph_report(
        graph,
        labels=labels_of(graph, settings.labels),
        images=images,
        image_note=note,
        groups=groups,
        top=settings.top,
        validation=settings.validation,
        edit=settings.edit,
    )
    with replacing(settings.out):
        write_report(settings.out, page)
    emit({"report": str(settings.out), "image": _about_images(images, note)}, as_json=json)
