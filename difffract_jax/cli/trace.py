"""The command that traces: `trace`, for one run; for many, `many_traces` has the loop.

It follows the rules of `main`: settings in, artefacts and a short table out; progress on stderr; imports when it runs.
"""

import sys
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.feature_pages import Pages, page_table, pages_at_hand, with_pages
from difffract_jax.cli.runs import warn_cut
from difffract_jax.config import UserError, provenance
from difffract_jax.trace_settings import TraceConfig

Share = Annotated[
    str | None,
    typer.Option("--share", help="Of many runs, the part that this process traces, as 2/4; others trace the others."),
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="Of many runs, try those again that could not be traced; the others stay."),
]


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(trace)


@opt.command(
    TraceConfig,
    arguments=("model", "transcoders", "prompt"),
    before={"seed": ("steps",), "max_nodes": ("height", "width", "text_tokens", "guidance", "negative_prompt")},
)
def trace(settings: TraceConfig, *, share: Share = None, retry: Retry = False, pages: Pages = None, json: bool) -> None:
    """Trace the circuit behind a feature, a direction of the velocity or a colour of the image, and save it as a graph.

    Example: `difffract trace organism organism "a red circle above a blue square" --target img/1/f12 --step 1`;
    all steps, from the pixels: `... --target pixels:color=red,box=0,0,32,16 --step 0-3`
    """
    if settings.prompts is not None or settings.seeds is not None:
        from difffract_jax.cli.many_traces import trace_many

        if pages is not None:
            raise UserError("--pages shows the features of one graph; leave it out, or --prompts and --seeds.")
        return trace_many(settings, share=share, retry=retry, json=json)
    if share is not None:
        raise UserError("--share divides many runs; leave it out, or give --prompts or --seeds.")
    if retry:
        raise UserError("--retry tries runs of many again; leave it out, or give --prompts or --seeds.")
    opt.check_out(settings.out, ".npz")
    if settings.export_json:
        opt.check_out(settings.export_json, ".json")
    from difffract_jax.circuits.attribution.attribute import attribute
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.graph_tables import graph_summary
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.cli.tracing import listed, open_tracing, recorded, resolved
    from difffract_jax.graphs.files.reference_json import write_reference_json

    opened = open_tracing(settings)
    at_hand = pages_at_hand(pages, opened.tcs.source)
    captured = recorded(opened, settings)
    if settings.activations is not None:
        settings = settings.model_copy(update={"step": str(captured.info.step), "seed": captured.info.seed})
    targets = resolved(opened, captured)
    record = provenance("trace", settings, **opt.sources(model=opened.pipe, transcoders=opened.tcs))
    tcs, expansion = opened.tcs, opened.expansion
    del opened  # what the trace does not hold of the model is memory for the pull-back
    with progress("Expanding nodes") as advance:
        graph = attribute(captured, tcs, target=targets, **expansion, progress=advance)
    _warn(captured.info.cut, graph)
    graph = graph.with_provenance(**record)
    with replacing(settings.out, *([settings.export_json] if settings.export_json else [])):
        graph.save(settings.out)
        if settings.export_json:
            write_reference_json(graph, settings.export_json)
    told = graph_summary(graph)
    told |= {"strongest sources": with_pages(told["strongest sources"], at_hand, "from")}
    emit({"graph": str(settings.out)} | told | page_table(listed(settings.target), at_hand), as_json=json)


def _warn(cut: str, graph: Any) -> None:
    """Tells if the prompt was cut, and if a graph of several steps knows nothing of the features of some."""
    from difffract_jax.cli.graph_tables import expanded_by_step

    warn_cut(cut)
    expanded = expanded_by_step(graph)
    missed = [str(step) for step, count in expanded.items() if not count]
    if missed and len(expanded) > 1:
        sys.stderr.write(
            f"Warning: no feature of step {', '.join(missed)} was expanded, since most influence lies in the last; "
            "raise --max-nodes, or lower --expansion-batch so that influence is computed more often.\n"
        )
