"""The commands that say why without a new graph: `heads`, of a graph's attention, and `effects`, of an output.

They follow the rules of `cli.py`: settings in, artefacts and a short table out; progress on stderr; imports when a
command runs.
"""

from typing import Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.preflight import check_fits, check_graph_fits, known_of, loras_of
from difffract_jax.cli.runs import region_of, run_of, starting_noise, warn_cut
from difffract_jax.cli.settings import EffectsConfig, HeadsConfig
from difffract_jax.cli.steer import labels_of
from difffract_jax.cli.validate import rerun
from difffract_jax.config import UserError, provenance


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(heads)
    app.command()(effects)


@opt.command(
    HeadsConfig,
    arguments=("model", "transcoders", "graph"),
)
def heads(settings: HeadsConfig, *, json: bool) -> None:
    """Say which attention heads carry the edges into a target, and what makes an attention score.

    The graph's run is captured anew, of one step. Every path from a source to the target takes a last attention hop,
    or none: by its head, edges are split exactly, those from features that the graph did not expand included.

    A score (--score), before the softmax, is split into pairs of what makes the query and what makes the key: features,
    errors, inputs, and the constants of either side. Share is of the absolute values.

    Example: `difffract heads organism organism graph.npz --score double/1/h1@img12,txt4`
    """
    from difffract_jax.circuits.effects import heads as by_head
    from difffract_jax.circuits.effects.attention import score_parts
    from difffract_jax.cli.graph_files import read
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit
    from difffract_jax.cli.used import load_for_graph
    from difffract_jax.graphs.names import node_names

    asked = None if settings.score is None else by_head.parse_score(settings.score)
    if asked is None:
        opt.check_used(settings, ("centred",), "without --score; add that, or leave it out.")
    graph = read(settings.graph)
    node = by_head.target_node(graph, settings.target)
    check_graph_fits("heads", settings, graph)
    pipe, place = open_model("heads", settings, **known_of(graph) | loras_of(graph, settings.lora))
    tcs = load_for_graph(settings.transcoders, pipe.config.transformer.layout, graph, weights=place)
    again = rerun(pipe, tcs, graph, settings)
    labels, engine = labels_of(settings.transcoders, tcs.source), again.engine
    # The score first: what it names may not be there, and heads take longer.
    scores = {}
    if asked is not None:
        place = asked.model_block(engine.infos[0].layout), asked.head, asked.query, asked.key
        parts = score_parts(engine, *place, centred=settings.centred)
        scores = _score(settings, engine, parts, labels)
    found = by_head.carried(engine, int(again.rows[node]))
    error, held = by_head.edge_error(found, graph, again.rows, node)
    shown = {"target": node_names(graph)[node], "sum of its edges": float(found.edges.sum())}
    shown |= {"edges of the graph that heads add up to": held, "worst error, over the largest": error}
    shown |= {"heads": _carriers(found, engine, settings.top)} | scores
    record = provenance("heads", settings, **opt.sources(model=pipe, transcoders=tcs))
    emit((record if json else {}) | shown, as_json=json)


def _carriers(found: Any, engine: Any, top: int) -> list[dict[str, Any]]:
    """Returns the table of heads, whose sums add up: the strongest, all others, and what took no hop."""
    whole = sum(one.absolute for one in (*found.heads, found.direct)) or 1.0
    rows = [
        {"head": one.name, "sum": one.total, "absolute": one.absolute, "share": one.absolute / whole}
        | _named(engine, one.strongest, None, "strongest source")
        | {"its loading": one.loading}
        for one in (*found.heads[:top], found.direct)
    ]
    rest = found.heads[top:]
    if rest:
        total, absolute = sum(one.total for one in rest), sum(one.absolute for one in rest)
        row = {"head": f"{len(rest)} others", "sum": total, "absolute": absolute, "share": absolute / whole}
        rows.insert(-1, row | {name: None for name in rows[0] if name not in row})
    return rows


def _score(settings: HeadsConfig, engine: Any, parts: Any, labels: Any) -> dict[str, Any]:
    """Returns the tables of an attention score."""
    import numpy as np

    from difffract_jax.circuits.effects import heads as by_head
    from difffract_jax.graphs.graph import FEATURE

    table = engine.table
    kinds = by_head.by_kind(parts, table)
    features = np.flatnonzero((table.kind == FEATURE) & (table.value > 0))
    pairs = [
        _named(engine, a, labels, "query") | _named(engine, b, labels, "key") | {"product": value}
        for a, b, value in by_head.strongest_pairs(parts, features, settings.top)
    ]
    terms = [
        {"side": side} | _named(engine, row, labels, "feature") | {"term": value}
        for side, row, value in by_head.strongest_terms(parts, features, settings.top)
    ]
    split = [
        {"query": side} | dict(zip(by_head.SIDES, map(float, row), strict=True))
        for side, row in zip(by_head.SIDES, kinds, strict=True)
    ]
    return {
        "attention score": settings.score,
        "above its query's mean" if settings.centred else "score": parts.score,
        "constant": parts.constant,
        "linear terms of the query": float(parts.query_terms.sum()),
        "linear terms of the key": float(parts.key_terms.sum()),
        "pairs": float(kinds[:3, :3].sum()),
        "error of their sum": abs(float(kinds.sum()) - parts.score),
        "score by what makes the query, and the key": split,
        "strongest pairs of features": pairs,
        "strongest features with the other side's constant": terms,
    }


def _named(engine: Any, row: int, labels: Any, column: str) -> dict[str, Any]:
    """Returns a source's name under a column, and what it detects beside it if there are labels."""
    import numpy as np

    from difffract_jax.circuits.attribution.expansion import source_names
    from difffract_jax.circuits.attribution.selection import named
    from difffract_jax.graphs.graph import FEATURE

    shown = {column: source_names(engine.table, np.array([row]), engine.infos[0].layout)[0]}
    if labels is None:
        return shown
    is_feature = engine.table.kind[row] == FEATURE
    return shown | {f"{column} detects": str(labels.of(named(engine, row))) if is_feature else ""}


@opt.command(
    EffectsConfig,
    arguments=("model", "transcoders", "prompt"),
    without=("embeddings",),
    before={"seed": ("steps",), "include_padding": ("height", "width", "text_tokens", "guidance", "negative_prompt")},
)
def effects(settings: EffectsConfig, *, json: bool) -> None:
    """Say what every feature of a run adds to a colour or to the velocity, along all paths of all steps.

    No graph is needed: one backward pass, with attention and norms as they were. Features are printed ready to paste
    into --edit of `steer`; without one, the output moves by minus its effect. Effects along one path overlap, so that
    their sum is not the output's value.

    Example: `difffract effects organism organism "a red circle left of a blue square" --target pixels:color=red`
    """
    from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
    from difffract_jax.circuits.effects.total_effects import total_effects
    from difffract_jax.circuits.notation.feature import Feature
    from difffract_jax.cli.models import dtype_named
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit
    from difffract_jax.cli.workloads import steps_of
    from difffract_jax.loading import load_transcoders

    asked = parse_target(settings.target)
    if isinstance(asked, Feature):
        raise UserError(
            f"{asked} is a feature, but total effects are those on an output, pixels:... or velocity:...; "
            "`difffract trace` explains features."
        )
    last = steps_of(settings) - 1 if settings.step is None else settings.step
    known: dict[str, Any] = {"step": f"0-{last}", "output": True}
    check_fits("effects", settings, **known)
    pipe, place = open_model("effects", settings, **known)
    tcs = load_transcoders(settings.transcoders, dtype=dtype_named(settings.transcoder_dtype), weights=place)
    span, inside = _recorded(pipe, tcs, settings)
    output = resolve_target(pipe, span, asked)
    shown = _effects(settings, span, tcs, output, total_effects(span, tcs, output), inside)
    warn_cut(span.info.cut)
    record = provenance("effects", settings, **opt.sources(model=pipe, transcoders=tcs))
    emit((record if json else {}) | shown, as_json=json)


def _recorded(pipe: Any, tcs: Any, settings: EffectsConfig) -> tuple[Any, Any]:
    """Records the run up to the target's step, and marks the image tokens that count."""
    import numpy as np

    from difffract_jax.circuits.notation.region import tokens_in
    from difffract_jax.circuits.trace.capture import capture_steps

    run = run_of(pipe, settings)
    region = region_of(pipe, run, settings)
    inside = np.ones(run.grid[0] * run.grid[1], bool)
    if region is not None:
        inside = np.isin(np.arange(inside.size), tokens_in(region, run.grid))
    span = capture_steps(
        pipe,
        tcs,
        settings.prompt,
        last=run.steps - 1 if settings.step is None else settings.step,
        seed=settings.seed,
        run=run,
        latents=starting_noise(pipe, settings),
        include_padding=settings.include_padding,
    )
    return span, inside


def _effects(settings: EffectsConfig, span: Any, tcs: Any, output: Any, found: Any, inside: Any) -> dict[str, Any]:
    """Returns the tables of effects."""
    import numpy as np

    from difffract_jax.circuits.attribution.engine import output_value
    from difffract_jax.circuits.effects.effect_tables import side_sums, strongest

    labels, last = labels_of(settings.transcoders, tcs.source), span.traces[-span.info.branches :]
    own = np.stack([np.asarray(trace.record.replaceable_text) for trace in last])
    velocity = sum(trace.info.velocity_weight * trace.record.velocity for trace in last)
    features = [
        {"feature": str(one.feature), "side": one.side, "effect": one.effect}
        | ({} if labels is None else {"detects": str(labels.of(one.feature))})
        for one in strongest(found, tcs, inside, own, settings.top)
    ]
    return {
        "target": settings.target,
        "step": output.step,
        "its value": output_value(output, velocity, last[0].record.latents),
        "image tokens counted": f"{inside.sum()} of {inside.size}",
        "text embedding": _total(found.text),
        **({} if found.negative_text is None else {"negative text embedding": _total(found.negative_text)}),
        "noise": _total(found.noise[inside]),
        "features": features,
        "sums": [{k: v for k, v in row._asdict().items() if v is not None} for row in side_sums(found, inside)],
    }


def _total(effects: Any) -> float:
    """Returns the sum of some effects, in float64."""
    import numpy as np

    return float(np.asarray(effects, np.float64).sum())
