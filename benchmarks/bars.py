"""Every figure that the first release is held to, measured on the reference's golden data: figure, bar, measured.

1. Forward passes: T5, CLIP, every block, the whole run, the autoencoder.
2. Transcoders and SAEs.
3. Graphs: nodes, edges, conservation in float32 and float64.
4. An edge is the effect of its direct intervention; edits and replacements in the running model are the reference's.
5. Compilations.

    python benchmarks/bars.py [--json]

The table is that of docs/accuracy.md. Errors are relative 2-norms, the worst over prompts, blocks, streams and targets,
unless the figure says otherwise. The exit status is 1 if a bar is missed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax  # noqa: E402  (the tests' golden data, traces and tolerances, after the path above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from difffract_jax.circuits.attribution import pullback  # noqa: E402
from difffract_jax.circuits.attribution.attribute import attribute  # noqa: E402
from difffract_jax.circuits.attribution.pullback import pull_back  # noqa: E402
from difffract_jax.circuits.attribution.selection import strongest_feature  # noqa: E402
from difffract_jax.circuits.attribution.sources import source_table  # noqa: E402
from difffract_jax.circuits.editing.interventions import Edit, WholeSite, steer  # noqa: E402
from difffract_jax.circuits.frozen.replacement import run_replacement  # noqa: E402
from difffract_jax.circuits.frozen.targets import Targets, preactivations  # noqa: E402
from difffract_jax.circuits.notation.feature import Feature  # noqa: E402
from difffract_jax.cli.output import emit  # noqa: E402
from difffract_jax.graphs.comparison import compare  # noqa: E402
from difffract_jax.graphs.files.reference_json import from_document  # noqa: E402
from difffract_jax.graphs.graph import FEATURE, Graph, conservation_scale  # noqa: E402
from difffract_jax.graphs.pruning import prune  # noqa: E402
from difffract_jax.loading import load_pipeline, load_transcoders  # noqa: E402
from difffract_jax.models import pipeline  # noqa: E402
from difffract_jax.models.blocks import Cond, Streams  # noqa: E402
from difffract_jax.models.mmdit import Inputs, MMDiT  # noqa: E402
from difffract_jax.models.stacks import sequences, slice_layer, streams  # noqa: E402
from tolerances import REFERENCE, TOL, relative_error  # noqa: E402
from traces import MORE_VARIANTS, PROMPTS, SIZE, VARIANTS, Golden, golden_trace, make_exact  # noqa: E402

GRID = (6, 6)
RUN_REPLACEMENT = jax.jit(run_replacement)
LIMITS = {"max_nodes": 80, "expansion_batch": 10, "min_attribution": 1e-4}
REPLACED = {"form": "replace", "include_padding": True}
"""How the reference edits."""
MODES = {"amplify": "scale", "zero": "zero", "invert": "invert", "set": "set"}


@jax.jit
def run_block(stack: Any, number: Any, h: Streams, cond: Cond) -> Streams:
    """Returns the streams after one block of a stack."""
    after, _ = slice_layer(stack, number)(sequences(h, stack.groups), cond)
    return streams(after, stack.groups, h)


@jax.jit
def run_transcoder(module: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
    """Returns pre-activations, codes and reconstructions of rows that each have their own time."""
    return tuple(jax.vmap(function)(x, t) for function in (module.preactivation, module.encode, module))


class Bar(NamedTuple):
    """One line of the table.

    Attributes:
        figure: what is measured.
        bar: the largest value allowed.
        measured: the value.
        kept: whether it keeps to the bar.
    """

    figure: str
    bar: float
    measured: float
    kept: bool


def bar(figure: str, most: float, measured: float) -> Bar:
    """Returns a line of the table."""
    return Bar(figure, most, float(measured), bool(measured <= most))


def forward(golden: Golden) -> Iterator[Bar]:
    """Measures forward passes."""
    pipe, data = golden.pipe, golden.forward
    encoded = [pipeline.encode(pipe, prompt, 16) for prompt in PROMPTS]
    for name, attribute_, key in (("T5", "text", "prompt_embeds"), ("CLIP, pooled", "pooled", "pooled")):
        errors = [relative_error(getattr(e, attribute_), data[f"p{i}_{key}"]) for i, e in enumerate(encoded)]
        yield bar(f"{name}, float32", TOL.f32_block, max(errors))
    double, single = zip(*(block_errors(pipe.transformer, data, prompt) for prompt in range(2)), strict=True)
    yield bar("MM-DiT, one double-stream block", TOL.f32_block, max(double))
    yield bar("MM-DiT, one single-stream block", TOL.f32_block, max(single))
    velocity = jax.jit(MMDiT.__call__, static_argnums=2)
    errors = [
        relative_error(velocity(pipe.transformer, inputs(data, p, s), GRID), data[f"p{p}_velocity"][s])
        for p in range(2)
        for s in range(4)
    ]
    yield bar("MM-DiT, velocity of any step", TOL.f32_run, max(errors))
    made = [
        pipeline.generate(pipe, p, latents=data[f"p{i}_initial_latents"], run=pipe.plan(**SIZE))
        for i, p in enumerate(PROMPTS)
    ]
    errors = [relative_error(m.latents, data[f"p{i}_final_latents"]) for i, m in enumerate(made)]
    yield bar("latents after a whole sampling run", TOL.f32_run, max(errors))
    raw = [pipeline.decode_raw(pipe.vae, jnp.asarray(data[f"p{i}_final_latents"]), GRID) for i in range(2)]
    errors = [relative_error(r.transpose(2, 0, 1), data[f"p{i}_vae_raw"]) for i, r in enumerate(raw)]
    yield bar("autoencoder, decoding", TOL.f32_block, max(errors))
    levels = [np.max(np.abs(m.image - 255 * data[f"p{i}_image"])) for i, m in enumerate(made)]
    yield bar("image of a run, largest difference in levels of 255", 1.0, max(levels))


def inputs(data: dict[str, np.ndarray], prompt: int, step: int) -> Inputs:
    """Returns what the golden transformer was given at a step."""
    arrays = (data[f"p{prompt}_latents"][step], data[f"p{prompt}_prompt_embeds"], data[f"p{prompt}_pooled"])
    latents, text, pooled = map(jnp.asarray, arrays)
    return Inputs(latents, text, pooled, jnp.asarray(data["timesteps"][step]))


def block_errors(model: MMDiT, data: dict[str, np.ndarray], prompt: int) -> tuple[float, float]:
    """Returns the largest error of a double- and a single-stream block, each given the golden input."""
    _, cond = jax.jit(MMDiT.embed, static_argnums=2)(model, inputs(data, prompt, int(data["block_step"])), GRID)
    after: dict[str, list[float]] = {"double": [], "single": []}
    before = Streams(jnp.asarray(data[f"p{prompt}_embed_img"]), jnp.asarray(data[f"p{prompt}_embed_txt"]))
    for kind, stack, depth in (("double", model.double, 3), ("single", model.single, 2)):
        for number in range(depth):
            ours = run_block(stack, number, before, cond)
            before = Streams(*(jnp.asarray(data[f"p{prompt}_{kind}_{stream}"][number]) for stream in ("img", "txt")))
            after[kind] += [relative_error(a, b) for a, b in zip(ours, before, strict=True)]
    return max(after["double"]), max(after["single"])


def transcoders() -> Iterator[Bar]:
    """Measures transcoders and SAEs on their golden rows."""
    data = dict(np.load(REFERENCE / "golden_transcoder.npz"))
    for kind, folder in (("tc", "transcoders"), ("sae", "saes")):
        errors = []
        for stream in ("img", "txt"):
            stack = load_transcoders(REFERENCE / folder).stacks[stream]
            for layer in range(3):
                module = jax.tree.map(lambda leaf, n=layer: leaf[n], stack)
                place = f"{kind}_{stream}_{layer}"
                rows = jnp.asarray(data[f"{place}_x"])[:, None], jnp.asarray(data[f"{place}_t"])
                for name, found in zip(("h_pre", "z", "rec"), run_transcoder(module, *rows), strict=True):
                    errors.append(relative_error(found[:, 0], data[f"{place}_{name}"]))
        yield bar(f"{'transcoder' if kind == 'tc' else 'SAE'} forward", TOL.f32_block, max(errors))


def graphs(golden: Golden) -> Iterator[Bar]:
    """Measures the five golden graphs, as traced, summed over positions, and pruned."""
    errors, differing, conserved = [], 0, []
    for number in range(5):
        trace, target = golden_trace(golden, number)
        feature = Feature(target["stream"], target["layer"], target["feat_idx"])
        graph = attribute(trace, golden.tcs, target=feature, **LIMITS)
        document = json.loads((REFERENCE / f"golden_graph_{number}.json").read_text(encoding="utf-8"))
        for ours, kind in ((graph, "aggregated"), (prune(graph, mode="difffract"), "pruned")):
            found = compare(ours, from_document(document[kind]))
            errors.append(found.largest_error)
            differing += len(found.nodes_only_in_a + found.nodes_only_in_b)
            differing += found.edges_only_in_a + found.edges_only_in_b
        raw = dict(np.load(REFERENCE / f"golden_graph_{number}.npz"))
        differing += abs(graph.edge_source.size - raw["edge_attribution"].size)
        errors.append(sorted_error(graph, raw))
        conserved.append(graph.largest_conservation_error)
    yield bar("graphs: nodes and edges in one and not the other", 0, differing)
    yield bar("edges: largest error over largest edge", TOL.edge, max(errors))
    yield bar("conservation per target, float32, over absolute edges and bias", TOL.conservation_f32, max(conserved))


def sorted_error(graph: Graph, raw: dict[str, np.ndarray]) -> float:
    """Returns the largest difference of single-position edges, largest first; the tests compare them pair by pair."""
    ours, theirs = (np.sort(edges.astype(np.float64)) for edges in (graph.edge_attribution, raw["edge_attribution"]))
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def laws() -> Iterator[Bar]:
    """Measures conservation and single edges against direct interventions, whatever is replaced."""
    variants = VARIANTS | MORE_VARIANTS  # the tests hold all of them to these bars
    names = ("every site", "a skip", "a gap")
    with jax.enable_x64(True):
        exact = [law(make_exact(**variants[name])) for name in names]
    single = [law(make_exact(dtype=jnp.float32, **variants[name])) for name in names]
    yield bar("conservation per target, float64", TOL.conservation_x64, max(found.conserved for found in exact))
    yield bar("edge against its direct intervention, float64", TOL.intervention_x64, max(found.edge for found in exact))
    yield bar(
        "edge against its direct intervention, float32, over the target's sum of absolute edges",
        TOL.direct_f32,
        max(found.share for found in single),
    )


class Law(NamedTuple):
    """Errors of one trace's edges.

    Attributes:
        conserved: edges + bias - pre-activation, over the target's absolute edges and bias.
        edge: edge - effect of doubling its source, over the largest edge of that source.
        share: the same over the target's sum of absolute edges.
    """

    conserved: float
    edge: float
    share: float


def law(exact: Any) -> Law:
    """Measures eight targets of the last block, and the eight strongest sources of each."""
    table = source_table((exact.replacement,), (exact.trace.info,))
    rows = np.flatnonzero((table.kind == FEATURE) & (table.value > 0) & (table.block == table.block.max()))
    stream, position, feature = (jnp.asarray(c[rows[:8]], jnp.int32) for c in (table[1], table[3], table[4]))
    info = exact.trace.info
    group = info.layout.groups_at(table.block[rows[:8]], stream)
    row = info.layout.rows_at(group, stream, position, info.tokens_of)
    layer = jnp.full(len(stream), info.recorded.index(int(table.block.max())), jnp.int32)
    targets = Targets(*(jnp.asarray(column, jnp.int32) for column in (group, layer, row, feature)))
    edges = np.asarray(pull_back(exact.replacement, targets), np.float64)
    sums = np.abs(edges).sum(1)
    record, sites, sources = exact.replacement

    def values(sources: Any) -> np.ndarray:
        moved = RUN_REPLACEMENT(record, sites, sources).mlp_in
        return np.asarray(preactivations(exact.replacement, targets, moved), np.float64)

    zero = values(jax.tree.map(jnp.zeros_like, sources))
    u = np.asarray(preactivations(exact.replacement, targets, exact.trace.record.mlp_in), np.float64)
    before, edge, share = values(sources), [], []
    for place, column in strongest_places(exact, edges):
        doubled = list(sources.values)
        doubled[place[0]] = doubled[place[0]].at[place[1:]].multiply(2)
        moved = values(sources._replace(values=tuple(doubled))) - before
        error = np.abs(moved - edges[:, column])
        edge.append(np.max(error) / np.max(np.abs(edges[:, column])))
        share.append(np.max(error / sums))
    missed = np.abs(edges.sum(1) + zero - u) / conservation_scale(sums, zero)
    return Law(float(np.max(missed)), max(edge), max(share))


def strongest_places(exact: Any, edges: np.ndarray) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields the eight features with the largest edges: (group, layer, row, place), and their column of edges."""
    table = source_table((exact.replacement,), (exact.trace.info,))
    size = np.where((table.kind == FEATURE) & (table.value > 0), np.abs(edges).max(axis=0), 0.0)
    for column in np.argsort(-size)[:8]:
        info = exact.trace.info
        group = int(info.layout.groups_at(table.block[column], table.stream[column]))
        row = int(info.layout.rows_at(group, table.stream[column], table.position[column], info.tokens_of))
        layer = info.recorded.index(int(table.block[column])) - exact.replacement.record.first_layers[group]
        index = np.asarray(exact.replacement.sites[group].layers.index)[layer, row]
        yield (group, layer, row, int(np.flatnonzero(index == table.feature[column])[0])), int(column)


def interventions(golden: Golden) -> Iterator[Bar]:
    """Measures edits and whole replacements in the running model against the reference's final latents."""
    data, errors = dict(np.load(REFERENCE / "golden_intervention.npz")), []
    for case in json.loads((REFERENCE / "golden_intervention.json").read_text(encoding="utf-8")):
        noise = golden.forward["p0_initial_latents"]
        made = steer(
            golden.pipe,
            golden.tcs,
            PROMPTS[0],
            list(edits(case)),
            latents=noise,
            run=golden.pipe.plan(**SIZE),
            **REPLACED,
        )
        errors.append(relative_error(made.latents, data[f"final_{case['name']}"]))
    yield bar("interventions, final latents", TOL.intervention_f32, max(errors))
    data, errors = dict(np.load(REFERENCE / "golden_replacement.npz")), []
    for name, folder in (("transcoder", "transcoders"), ("sae", "saes")):
        tcs = load_transcoders(REFERENCE / folder)
        sites = [WholeSite(label, number) for label, numbers in tcs.sites.labels.items() for number in numbers]
        for number, prompt in enumerate(PROMPTS):
            noise = golden.forward[f"p{number}_initial_latents"]
            made = steer(
                golden.pipe, tcs, prompt, [], replaced=sites, latents=noise, run=golden.pipe.plan(**SIZE), **REPLACED
            )
            errors.append(relative_error(made.latents, data[f"p{number}_final_{name}"]))
    yield bar("every MLP replaced, final latents", TOL.intervention_f32, max(errors))


def edits(case: dict[str, Any]) -> Iterator[Edit]:
    """Yields the reference's description of an intervention as edits."""
    for edit in case["features"]:
        yield Edit(
            f"{edit['stream']}/{edit['layer']}/f{edit['feat_idx']}",
            MODES[edit["mode"]],
            edit["scale"],
            steps=None if edit["steps"] is None else frozenset(edit["steps"]),
            threshold=edit["token_threshold"] if edit["token_mode"] == "threshold" else None,
        )
    for site in case["streams"]:
        yield from (Edit(WholeSite(site["stream"], b), "zero", steps=frozenset(site["steps"])) for b in site["layers"])


def compilations(golden: Golden) -> Iterator[Bar]:
    """Counts the programs that runs and traces of one size compile."""
    pipeline.euler_step.clear_cache()
    for seed, steps in ((0, 4), (1, 3)):
        pipeline.generate(golden.pipe, PROMPTS[seed], seed=seed, run=golden.pipe.plan(steps=steps, **SIZE))
    yield bar("programs for the steps of two runs of one size", 1, pipeline.euler_step._cache_size())
    trace, _ = golden_trace(golden, 0)
    pullback._pull_back.clear_cache()
    for stream, block in (("img", 2), ("txt", 2), ("img", 1)):
        attribute(trace, golden.tcs, target=strongest_feature(trace, golden.tcs, stream, block), **LIMITS)
    yield bar("programs for the pull-backs of three targets of one trace", 1, pullback._pull_back._cache_size())


def main() -> None:
    """Measures everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    as_json = parser.parse_args().json
    pipe, tcs = load_pipeline(REFERENCE / "pipeline"), load_transcoders(REFERENCE / "transcoders")
    golden = Golden(pipe, tcs, dict(np.load(REFERENCE / "golden_forward.npz")))
    with jax.default_matmul_precision("highest"):
        parts = (forward(golden), transcoders(), graphs(golden), laws(), interventions(golden), compilations(golden))
        rows = [row for part in parts for row in part]
    if as_json:
        emit({"bars": [row._asdict() for row in rows]}, as_json=True)
    else:
        lines = [f"| {row.figure} | {row.bar:.3g} | {row.measured:.2g} |" for row in rows]
        sys.stdout.write("\n".join(["| figure | bar | measured |", "|---|---|---|", *lines]) + "\n")
    sys.exit(0 if all(row.kept for row in rows) else 1)


if __name__ == "__main__":
    main()
