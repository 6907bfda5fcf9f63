"""The commands that show a graph: `view`, one page that a browser opens from disk, and `report`; for `main.py`.

They follow its rules. Weights are needed for the image of the run alone, which is made once and kept beside the graph.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.settings import ReportConfig, ShownGraph, ViewConfig
from difffract_jax.config import ORGANISMS, UserError
from difffract_jax.storage.files import is_occupied


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(view)
    app.command()(report)


@opt.command(ViewConfig, arguments=("graph",), layers=(), local=("pages",))
def view(settings: ViewConfig, *, json: bool) -> None:
    """Show a graph: one file that a browser opens from disk, without a network.

    Rows are blocks, columns the prompt's words and the image's columns. Point at a node to see where it is active, at
    the image or a word to see its nodes; click for the edges. Prune, pin, group and name, and save that as a
    `.groups.json`, which `prune`, `steer` and `export` read. With --serve, Save writes it beside the graph.

    Example: `difffract view graph.npz`, then open graph.html
    """
    out = settings.out or settings.graph.with_suffix(".html")
    _check_serving(settings)
    if not settings.serve:
        opt.check_out(out, ".html")
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.dashboards.render import write_report
    from difffract_jax.dashboards.viewer_page import viewer_page

    whole = read(settings.graph)
    shown, parts = page_parts(whole, settings)
    if settings.serve:
        return _serve(whole, shown, parts, settings, json)
    page = viewer_page(shown, parts)
    with replacing(out):
        write_report(out, page)
    told = {"page": str(out), "nodes": int(shown.node_kind.size), "edges": int(shown.edge_source.size)}
    emit(
        told | {"size": f"{len(page.encode()) / 1e6:.2f} MB", "image": _about_images(parts.images, parts.image_note)},
        as_json=json,
    )


def _check_serving(settings: ViewConfig) -> None:
    """Refuses options that would do nothing."""
    if settings.serve and settings.out is not None:
        raise UserError("With --serve no page is written, so that --out names nothing; leave one of the two out.")
    if settings.port is not None and not settings.serve:
        raise UserError("--port is of a served page; add --serve, or leave --port out.")


def _about_images(images: Any, note: str) -> str:
    """Says which images of the run are shown, or why none is."""
    steps = [image.step for image in images if image.step is not None]
    predicted = f", and as step {', '.join(map(str, steps))} predicted it" if steps else ""
    return f"finished{predicted}" if images else note


def page_parts(whole: Any, settings: ViewConfig) -> tuple[Any, Any]:
    """Returns the graph that the page shows, and all that it shows beside it.

    Args:
        whole: the graph as it was read.
        settings: of the page.

    Raises:
        UserError: if the graph is too large for a page, or what is shown beside it belongs to another.
    """
    from difffract_jax.cli.graph_files import read
    from difffract_jax.dashboards.features.addresses import open_pages
    from difffract_jax.dashboards.page_data import Limits, check_difference, leads_forward, shown_graph
    from difffract_jax.dashboards.page_groups import grouped
    from difffract_jax.dashboards.page_labels import known_labels
    from difffract_jax.dashboards.viewer_page import PageParts
    from difffract_jax.graphs.combine import difference
    from difffract_jax.graphs.names import feature_names

    groups = _opened_groups(whole, settings)
    limits = Limits(settings.max_nodes, settings.max_links)
    how = {"by_position": settings.by_position, "limits": limits}
    shown = grouped(shown_graph(whole, **how, name=str(settings.graph)))
    other = between = None
    other_images, other_note = (), ""
    labels = known_labels(whole, settings.labels)
    if settings.compare is not None:
        if settings.by_position:
            raise UserError("Two graphs are compared as sums over positions; leave --by-position out.")
        second = read(settings.compare)
        other, between = shown_graph(second, **how, name=str(settings.compare)), difference(whole, second)
        between = between if leads_forward(between) else None  # of sums over positions, which may run in circles
        if between is not None:
            check_difference(between, limits)
        theirs = known_labels(second, settings.labels)
        labels = theirs | labels  # the second has features that the first lacks
        only_first = {"image": None, "lora": ()}  # the second's LoRAs are those that it was traced with
        try:
            other_images, note = images_of(second, settings.model_copy(update=only_first | {"graph": settings.compare}))
        except UserError as error:
            note = str(
                error
            )  # --model is the first's; the second may be of it with a LoRA that is not at hand any more
        other_note = note.partition("; give ")[0].removesuffix(".") + "." if note else ""  # --image is of the first
    names = {name for graph in (shown, other) if graph is not None for name in feature_names(graph)} - {""}
    pages = None if settings.pages is None else open_pages(settings.pages, whole.provenance.transcoders)
    images, note = images_of(whole, settings)
    return shown, PageParts(
        name=settings.graph.stem,
        title=_title(shown, settings.graph, other),
        labels=labels,
        images=images,
        image_note=note,
        groups=groups,
        pages=pages and pages_address(settings),
        without_page=pages.missing(names) if pages else (),
        other=other,
        other_images=other_images,
        other_image_note=other_note,
        other_title="" if other is None else _title(other, settings.compare, other),
        difference=between,
    )


def _groups_path(settings: ViewConfig) -> Path:
    """Returns where a served page saves its groups; never over what another viewer saved."""
    from difffract_jax.graphs.files.viewer_groups import is_foreign
    from difffract_jax.graphs.groups import SUFFIX

    beside = settings.graph.with_name(settings.graph.stem + SUFFIX)
    if settings.groups is None and is_foreign(beside):
        raise UserError(
            f"{beside} is another viewer's, and the page would save over it; give it another name, and that name with "
            "--groups."
        )
    if settings.groups is None or not is_foreign(settings.groups):
        return settings.groups or beside
    if is_occupied(beside):
        raise UserError(
            f"{settings.groups} is another viewer's, so that the page would save as {beside}, which exists; move that, "
            "or leave --groups or --serve out."
        )
    return beside


def _opened_groups(whole: Any, settings: ViewConfig) -> Any:
    """Returns the groups that a page opens with; a served one with those that it would save over, if there are any."""
    from difffract_jax.graphs.files.viewer_groups import read_any_groups

    if not settings.serve:
        return None if settings.groups is None else read_any_groups(settings.groups, whole)
    path = _groups_path(settings)
    if settings.groups is not None and path != settings.groups:
        opt.check_out(path, ".json")
        return read_any_groups(settings.groups, whole)
    if not is_occupied(path):
        opt.check_out(path, ".json")
        return None
    try:
        return read_any_groups(path, whole)
    except UserError as error:
        if settings.groups is not None:
            raise
        raise UserError(f"{error} The page would save over it; name another file with --groups, or move it.") from None


def _title(graph: Any, path: Path | None, other: Any) -> str:
    """Returns what a page is called: what its graph explains; with two, the names of the files too."""
    from difffract_jax.graphs.names import node_name

    named = node_name(graph, graph.target)
    return named if other is None or path is None else f"{path.name}: {named}"


def pages_address(settings: ViewConfig) -> str:
    """Returns where a feature's page is, as seen from the page: a path, or an address of the server.

    Args:
        settings: of the page, which name the folder of feature pages.
    """
    assert settings.pages is not None
    folder = (settings.out or settings.graph).resolve().parent
    base = "pages" if settings.serve else quote(Path(os.path.relpath(settings.pages.resolve(), folder)).as_posix())
    return f"{base}/index.html#{{feature}}"


def image_at_hand(graph: Any, path: Path) -> Any:
    """Returns the image of a graph's run that need not be made: kept beside the graph, or in its document; else None.

    Args:
        graph: as it was read.
        path: its file.

    Raises:
        UserError: if the document's image cannot be read.
    """
    from difffract_jax.dashboards import image_files
    from difffract_jax.graphs.files.viewer_image import image_bytes

    if graph.provenance.run is not None:
        kept = image_files.read_kept(image_files.kept_path(path), run_key(graph))
        return None if kept is None else image_files.shown_images(kept)[0]
    data = image_bytes(graph.provenance.viewer)
    return None if data is None else image_files.shown(image_files.read_image(path, data))


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
        try:
            image = image_at_hand(graph, settings.graph)
        except UserError as error:
            return [], str(error)
        if image is not None:
            return [image], ""
        return [], "The file does not tell a run of one prompt, so there is no image; give one with --image FILE."
    key, path = run_key(graph), image_files.kept_path(settings.graph)
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
            kept = _made(graph, model, settings.lora)
        except UserError as error:
            if settings.model is not None:
                raise
            return [], str(error)  # the embedded model of another release, say; the graph can be shown all the same
        try:
            image_files.keep(kept, path, key)
        except OSError as error:
            sys.stderr.write(f"Note: the image could not be kept beside the graph ({error.strerror}).\n")
    return image_files.shown_images(kept), ""


def run_key(graph: Any) -> str:
    """Returns what tells the images of one run from those of another.

    Args:
        graph: of the run, which its provenance tells.
    """
    from difffract_jax.graphs.json_values import to_json_values

    run, steps = graph.provenance.run, graph.provenance.steps
    told = [run.model, run.prompt, run.seed, run.sigmas, run.grid, run.guidance, steps]
    return repr(to_json_values([*told, *([] if run.negative_prompt is None else [run.negative_prompt])]))


def _model_at_hand(graph: Any) -> str | None:
    """Returns the name of the model that a graph was traced in, if it is an embedded one."""
    named = (graph.provenance.settings or {}).get("model")
    return named if named in ORGANISMS else "organism" if graph.provenance.command == "demo" else None


def _made(graph: Any, model: str, lora: Sequence[str]) -> Any:
    """Makes the images of a graph's run."""
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.preflight import loras_of
    from difffract_jax.config import GenerateConfig
    from difffract_jax.dashboards.image_files import KeptImages
    from difffract_jax.dashboards.run_images import run_images

    run, steps = graph.provenance.run, tuple(graph.provenance.steps or (graph.provenance.run.step,))
    asked = {"model": model, "prompt": run.prompt} | loras_of(graph, lora)
    pipe = open_model("generate", GenerateConfig.model_validate(asked)).pipe
    with progress("Making the image") as advance:
        return KeptImages(run_images(pipe, run, steps, advance), steps)


def _serve(whole: Any, shown: Any, parts: Any, settings: ViewConfig, json: bool) -> None:
    """Serves the page until it is interrupted."""
    from difffract_jax.cli.output import emit
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
        lambda token: viewer_page(shown, parts._replace(token=token)),
        save,
        port=settings.port or 0,
        pages=settings.pages,
    )
    if json:
        emit({"open": server.address, "groups": str(path)}, as_json=True)
    else:
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
    from difffract_jax.dashboards.page_data import summed_where_possible
    from difffract_jax.dashboards.page_groups import grouped
    from difffract_jax.dashboards.page_labels import known_labels
    from difffract_jax.dashboards.render import write_report
    from difffract_jax.graphs.files.viewer_groups import read_any_groups

    graph = read(settings.graph)
    groups = None if settings.groups is None else read_any_groups(settings.groups, graph)
    images, note = images_of(graph, settings)
    page = graph_report(
        graph if groups is not None else grouped(summed_where_possible(graph)),
        labels=known_labels(graph, settings.labels, figures=True),
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
