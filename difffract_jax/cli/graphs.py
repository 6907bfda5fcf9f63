"""The commands that work on saved graphs: `prune`, `supernodes`, `combine`, `compare`, `export`, for `cli.py`.

They need neither weights nor an accelerator. They follow the rules of `cli.py`: settings in, artefacts and a short
table out; imports when a command runs; what can be refused is refused before anything is written.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.settings import SupernodesConfig
from difffract_jax.config import ExportConfig, PruneConfig, UserError, ViewerOptions, read_yaml
from difffract_jax.storage.remote.cache import local_file

SUFFIXES = {
    "difffract-v2": ".json",
    "circuit-tracer": ".json",
    "neuronpedia": ".json",
    "graphml": ".graphml",
    "csv": "",
}
FEW, MANY = 5, 10
"""Features that are too few to see a circuit, where there were so many times more of them before pruning."""
SHOWN_NAMES = 10
"""Names of each list that `compare` prints."""
combine = typer.Typer(
    help="Average circuits over prompts and seeds, or subtract one from another.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Out = Annotated[
    Path, typer.Option("--out", help="Graph file to write, `.npz`; one that exists is replaced, with a note.")
]
Graphs = Annotated[
    list[Path],
    typer.Argument(
        metavar="GRAPH", help="Graph files, or directories of `trace --prompts`, of one model and its transcoders."
    ),
]
TableOut = Annotated[Path | None, typer.Option("--out", help="Also write every edge to this `.csv` file.")]
MinShare = Annotated[float, typer.Option("--min-share", help="Leave out edges of a smaller share of the runs.")]
Draws = Annotated[int, typer.Option("--draws", help="Random draws of the runs.")]
DrawSeed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Edits = Annotated[
    Path | None,
    typer.Option(
        "--edits",
        help='JSON or YAML file of changes: `{"remove": [NAME], "rename": {OLD: NEW}, "set": {NAME: [NODE]}}`.',
    ),
]
SetSupernode = Annotated[
    list[str] | None,
    typer.Option("--set-supernode", metavar="NAME=NODE,NODE", help="Group these nodes by hand; as often as wanted."),
]
Labels = Annotated[
    Path | None, typer.Option("--labels", help="JSON or YAML file of names for features, as `img/3/f401: red`.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(prune)
    app.command()(supernodes)
    app.add_typer(combine, name="combine")
    app.command()(compare)
    app.command()(export)


@opt.command(PruneConfig, arguments=("graph",), layers=())
def prune(settings: PruneConfig, *, json: bool) -> None:
    """Keep a graph's most influential nodes and edges, and say how much of it its features explain.

    Replacement is the share of influence that reaches the inputs rather than ending in errors; completeness, the share
    of what enters the nodes that matter that comes from no error. They are told of the graph as it was, of the kept
    features with all others counted as error (pinned), and of what is left.

    Example: `difffract prune graph.npz --node-threshold .8 --edge-threshold .98 --out pruned.npz`
    """
    opt.check_out(settings.out, ".npz")
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.graph_tables import graph_summary
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.graphs import pruning
    from difffract_jax.graphs.files.viewer_groups import read_any_groups
    from difffract_jax.graphs.groups import with_groups
    from difffract_jax.graphs.json_values import to_json_values

    whole = read(settings.graph)
    groups = None if settings.groups is None else read_any_groups(settings.groups, whole)
    how = settings.model_dump(exclude={"graph", "groups", "out"})
    pruned = pruning.prune(whole, **how, keep=() if groups is None else groups.pinned)
    pruned = pruned if groups is None else with_groups(pruned, groups)
    with replacing(settings.out):
        pruned.save(settings.out)
    rows = [{"of": name} | found for name, found in to_json_values(pruned.provenance.scores).items()]
    emit({"graph": str(settings.out)} | graph_summary(pruned) | {"scores": rows}, as_json=json)
    _tell_few(whole, pruned)


def _tell_few(whole: Any, pruned: Any) -> None:
    """Tells if next to no feature is left because inputs hold most of the influence, as in the last denoising steps."""
    from difffract_jax.graphs.graph import FEATURE, INPUT
    from difffract_jax.graphs.names import feature_names

    left = int((pruned.node_kind[pruned.targets.size :] == FEATURE).sum())
    before = len({*feature_names(whole)} - {""})
    inner = pruned.node_influence[pruned.targets.size :]
    of_inputs = float(inner[pruned.node_kind[pruned.targets.size :] == INPUT].sum())
    if left < FEW and before >= MANY * max(left, 1) and of_inputs > float(inner.sum()) / 2:
        sys.stderr.write(
            f"Note: {left} of {before} features {'is' if left == 1 else 'are'} left, since inputs hold most of the "
            "influence; keep more with --node-threshold 0.98, then --edge-threshold 0.999, or trace all steps.\n"
        )


@opt.command(SupernodesConfig, arguments=("graph",), layers=(), before={"out": ("edits", "set_supernode")})
def supernodes(
    settings: SupernodesConfig, *, edits: Edits = None, set_supernode: SetSupernode = None, json: bool
) -> None:
    """Group features that do the same, by their edges in and out and by where they are active.

    Groups are named by their strongest member and kept in the graph file; exports show them. Change them with a file of
    edits, or one by one; nodes are written as the tables of other commands show them.

    Example: `difffract supernodes pruned.npz --threshold .6 --set-supernode "red=img/2/f401,img/3/f17"`
    """
    opt.check_out(settings.out, ".npz")
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.config import resolve
    from difffract_jax.graphs import supernodes as grouping
    from difffract_jax.graphs.names import node_names

    by_hand = dict(map(grouping.parse_assignment, set_supernode or ()))
    changes = [resolve(grouping.Edits, file=None if edits is None else local_file(edits)), grouping.Edits(set=by_hand)]
    grouped = read(settings.graph)
    if not settings.keep:
        grouped = grouping.find_supernodes(grouped, threshold=settings.threshold, map_weight=settings.map_weight)
    for change in changes:
        grouped = grouping.edit_supernodes(grouped, change)
    with replacing(settings.out):
        grouped.save(settings.out)
    names = node_names(grouped)
    rows = [
        {"supernode": name, "members": ", ".join(names[n] for n in group)} for name, group in grouped.supernodes.items()
    ]
    emit({"graph": str(settings.out), "groups": len(rows), "supernodes": rows}, as_json=json)


@combine.command("average")
def combine_average(graphs: Graphs, out: Out = Path("average.npz"), json: opt.Json = False) -> None:
    """Average the circuits of several prompts or seeds, feature by feature.

    They are summed over positions first. What a graph lacks counts as 0; in how many each node occurs stands in the
    result's provenance.

    Example: `difffract combine average seed0.npz seed1.npz seed2.npz --out average.npz`
    """
    from difffract_jax.graphs.combine import average

    _combined(average(_read(graphs, out)), out, json)


@combine.command("intervals")
def combine_intervals(
    graphs: Graphs,
    level: Annotated[float, typer.Option("--level", help="Of the intervals.")] = 0.95,
    min_share: MinShare = 0.05,
    draws: Draws = 2000,
    seed: DrawSeed = 0,
    out: TableOut = None,
    json: opt.Json = False,
) -> None:
    """Say how strong each edge is over many runs, how surely, and in what share of them it occurs.

    Intervals of the mean come from runs drawn with replacement (bootstrap). An edge of all runs whose interval leaves 0
    out is common to the prompts; one of a few runs belongs to those.

    Example: `difffract combine intervals graphs --out edges.csv`
    """
    from difffract_jax.cli.populations import show_intervals

    show_intervals(graphs, level=level, min_share=min_share, draws=draws, seed=seed, out=out, json=json)


@combine.command("contrast")
def combine_contrast(
    a: Annotated[Path, typer.Argument(metavar="A", help="Directory of `trace --prompts`: the first set of runs.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The second set, of the same transcoders.")],
    min_share: MinShare = 0.05,
    draws: Draws = 2000,
    seed: DrawSeed = 0,
    out: TableOut = None,
    json: opt.Json = False,
) -> None:
    """Say which edges differ between two sets of runs, with p-values that hold for all edges together.

    Runs change sets at random, and the largest difference of any edge is what an edge is held against (max T). Where
    both sets have the same prompts and seeds, as before and after a LoRA, pairs are compared.

    Example: `difffract combine contrast red blue --out differences.csv`
    """
    from difffract_jax.cli.populations import show_contrast

    show_contrast(a, b, min_share=min_share, draws=draws, seed=seed, out=out, json=json)


@combine.command("difference")
def combine_difference(
    a: opt.FirstGraph, b: opt.SecondGraph, out: Out = Path("difference.npz"), json: opt.Json = False
) -> None:
    """Subtract the second circuit from the first: positive edges are stronger in the first.

    Example: `difffract combine difference red.npz blue.npz --out difference.npz`
    """
    from difffract_jax.graphs.combine import difference

    _combined(difference(*_read([a, b], out)), out, json)


def _read(paths: list[Path], out: Path) -> list[Any]:
    """Reads graphs, each with its file's name; refuses an output that cannot be written first."""
    opt.check_out(out, ".npz")
    from difffract_jax.cli.graph_files import graphs_at

    return [graph for path in paths for graph in graphs_at(path)]


def _combined(graph: Any, out: Path, json: bool) -> None:
    """Saves and shows a combined graph."""
    from difffract_jax.cli.graph_tables import graph_summary
    from difffract_jax.cli.output import emit, replacing

    with replacing(out):
        graph.save(out)
    told = graph.provenance.combined
    shares = list(told.occurs_in.values())
    shown = {"graph": str(out), "operation": told.operation, "graphs": len(told.graphs)}
    shown |= {"nodes in all of them": f"{sum(share == 1 for share in shares)} of {len(shares)}"}
    emit(shown | graph_summary(graph), as_json=json)


def compare(a: opt.FirstGraph, b: opt.SecondGraph, json: opt.Json = False) -> None:
    """Compare two graphs, of any format: which nodes and edges both have, and how far their edges differ.

    Of the nodes that one alone has, the first are named; with --json all are.

    Example: `difffract compare graph.npz reference_graph.json --json`
    """
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit
    from difffract_jax.graphs.comparison import compare as hold

    comparison = hold(read(a), read(b))._asdict()
    emit(comparison if json else _figures_first(comparison), as_json=json)


def _figures_first(comparison: dict[str, Any]) -> dict[str, Any]:
    """Returns a comparison for people: its figures, then of each list of names how many there are, and the first."""
    lists = {key: names for key, names in comparison.items() if isinstance(names, list)}
    figures = {key: value for key, value in comparison.items() if key not in lists}
    return figures | {key: _first(names) for key, names in lists.items()}


def _first(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    shown = [*names[:SHOWN_NAMES], f"... and {more} more (--json lists all)"] if more > 0 else names
    return f"{len(names)}: {', '.join(shown)}" if names else "0"


def _with_labels(given: dict[str, Any]) -> dict[str, Any]:
    """Puts the names that the file of --labels holds in its place."""
    file = given["labels"]
    return given | {
        "labels": {str(name): str(label) for name, label in read_yaml(local_file(file)).items()} if file else None
    }


@opt.command(
    ExportConfig,
    arguments=("graph",),
    layers=(),
    without=("tokens",),
    local=("pages",),
    before={"overwrite": tuple(ViewerOptions.model_fields)},
    instead={"labels": Labels},
    prepare=_with_labels,
)
def export(settings: ExportConfig, *, json: bool) -> None:
    """Write a graph for another tool: the reference, circuit-tracer's viewer, Neuronpedia, networkx, a spreadsheet.

    For circuit-tracer's viewer, give the output's folder to its server and open the address that is printed: supernodes
    are shown only when the address names them. The list of graphs and what is known of features lie beside the graph.
    Neuronpedia must know the model that `--scan` names. Groups that are made there come back with --groups.

    Example: `difffract export pruned.npz --format circuit-tracer --out red-circle.json`
    """
    opt.check_out(settings.out, SUFFIXES[settings.format])
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.output import emit, replacing

    whole = graph = read(settings.graph)
    pinned: tuple[str, ...] = ()
    if settings.groups is not None:
        graph, settings, pinned = _grouped(graph, settings)
    with replacing(*([] if settings.overwrite else [settings.out])):
        shown = _write(graph, whole, settings, pinned)
    emit({"exported": str(settings.out), "format": settings.format} | shown, as_json=json)


def _grouped(graph: Any, settings: ExportConfig) -> tuple[Any, ExportConfig, tuple[str, ...]]:
    """Returns a graph with the groups of a file, settings with its names, labels given winning, and what it pins."""
    from difffract_jax.graphs.aggregation import aggregate
    from difffract_jax.graphs.files.viewer_groups import read_any_groups
    from difffract_jax.graphs.groups import given_names, with_groups

    assert settings.groups is not None
    groups = read_any_groups(settings.groups, graph)
    # A document shows sums over positions, unless it is to show positions, so that groups are taken of what is shown.
    graph = graph if settings.by_position else aggregate(graph)
    labels = given_names(graph, groups) | settings.labels
    return with_groups(graph, groups), settings.model_copy(update={"labels": labels}), groups.pinned


def _write(graph: Any, whole: Any, settings: ExportConfig, pinned: tuple[str, ...]) -> dict[str, Any]:
    """Writes the export, and returns what else to show."""
    from difffract_jax.cli.viewer_export import write_for_viewer
    from difffract_jax.graphs.files import tables
    from difffract_jax.graphs.files.reference_json import write_reference_json

    if settings.format == "csv":
        if settings.out.is_file():
            raise UserError(f"{settings.out} is a file, but csv is written as a directory; name another output.")
        tables.write_csv(graph, settings.out, overwrite=settings.overwrite)
    elif settings.format == "graphml":
        tables.write_graphml(graph, settings.out)
    elif settings.format == "difffract-v2":
        write_reference_json(graph, settings.out)
    else:
        return write_for_viewer(graph, whole, settings, pinned)
    return {"nodes": int(graph.node_kind.size), "edges": int(graph.edge_source.size)}
