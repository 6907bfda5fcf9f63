"""The pooled path over several steps and over both branches of guidance: the laws of one evaluation hold on."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import BRANCHES, NEGATIVE, PROMPT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, output_value
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pooled_path import integrate
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.cli.graph_tables import graph_summary
from difffract_jax.config import ViewerOptions
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.page_data import graph_bytes
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files import viewer_json
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.frozen_attention import without_pooled
from difffract_jax.graphs.graph import MODULATION, WORD, Graph
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.pruning import prune
from difffract_jax.models.embeddings import Embeddings
from difffract_jax.models.pipeline import encode, step_inputs
from tolerances import TOL
from traces import guided_pipeline, make_transcoders

TEXT, AWAY = "a red circle", "a blurred square"
SIZE = {"height": 24, "width": 32, "text_tokens": 16, "steps": 3}
SETTINGS = {"max_nodes": 4, "min_attribution": 1e-6, "pooled": "explained"}
PIXELS = "pixels:color=red,minus=blue,box=8,8,24,20"


@cache
def made(dtype, negative, scale=2.5):
    """A pipeline, its transcoders and a span of two steps; of one evaluation each where there is no negative prompt."""
    pipe = guided_pipeline(dtype)
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(1, 2), joint=(0, 1), skip=True, dtype=dtype)
    run = pipe.plan(**SIZE, guidance=scale, **{} if negative is None else {"negative_prompt": negative})
    return pipe, tcs, run, capture_steps(pipe, tcs, TEXT, first=1, last=2, run=run)


def targets_in(pipe, tcs, span):
    """What the last velocity writes, and a feature of the prompt's branch."""
    pixels = resolve_target(pipe, span, parse_target(PIXELS))
    return pixels, strongest_feature(span, tcs, "img", 2)


def of_kind(graph, kind):
    return np.flatnonzero(graph.node_kind == kind)


@pytest.mark.slow
def test_both_branches_of_all_steps_are_explained_in_one_graph(x64, tmp_path):
    pipe, tcs, _, span = made(jnp.float64, AWAY)
    graph = attribute(span, tcs, target=[(one, 1.0) for one in targets_in(pipe, tcs, span)], pipe=pipe, **SETTINGS)
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    for path, one in zip(graph.provenance.pooled_path, graph.provenance.pooled, strict=True):
        assert one.total + one.remainder == pytest.approx(path.value - path.without, rel=1e-9)
        assert abs(one.remainder) <= 1e-3 * one.absolute and one.direct != 0
    # Modulations of every evaluation are nodes; words are of one prompt each, and count to the first step.
    modulations, words, names = of_kind(graph, MODULATION), of_kind(graph, WORD), node_names(graph)
    evaluations = {*zip(graph.node_step[modulations].tolist(), graph.node_branch[modulations].tolist(), strict=True)}
    assert evaluations == {(1, PROMPT), (1, NEGATIVE), (2, PROMPT), (2, NEGATIVE)}
    assert {*graph.node_step[words]} == {1} and {*graph.node_branch[words]} == {PROMPT, NEGATIVE}
    assert len({*names}) == len(names) and {"final/scale#1~negative", "img/0/attn_shift#2~prompt"} <= {*names}
    for branch, said in ((PROMPT, TEXT), (NEGATIVE, AWAY)):
        spoken = [names[word] for word in words[graph.node_branch[words] == branch]]
        letters = "".join(name.removeprefix("word ").split("@")[0] for name in spoken if "<|" not in name)
        assert letters == said.replace(" ", "") and all(name.endswith(f"~{BRANCHES[branch]}") for name in spoken)
        assert np.array_equal(find_nodes(graph, spoken), words[graph.node_branch[words] == branch])
    into = np.isin(graph.edge_target, modulations)
    ends = graph.edge_source[into], graph.edge_target[into]
    assert np.array_equal(*(graph.node_branch[end] for end in ends)) and np.all(graph.node_kind[ends[0]] == WORD)
    level = node_levels(graph)
    assert np.all(level[graph.edge_source] < level[graph.edge_target]) and np.all(np.diff(graph.target_node) > 0)
    # Files, sums, pages and exports.
    graph.save(tmp_path / "g.npz")
    again = Graph.load(tmp_path / "g.npz")
    assert again.provenance == graph.provenance and node_names(again) == names
    summed = aggregate(graph)
    assert of_kind(summed, MODULATION).size == modulations.size and of_kind(prune(graph), MODULATION).size
    told = account(summed)
    parts = told.features + told.inputs + told.errors + told.rest + told.pooled + told.absent + told.bias
    assert parts == pytest.approx(told.value, rel=1e-6) and told.pooled != 0
    assert graph_summary(graph)["words"] and graph_bytes(graph)
    document = viewer_json.to_document(graph, "circuit-tracer", ViewerOptions(by_position=True, slug="a"))
    ids = [node["node_id"] for node in document["nodes"]]
    assert len({*ids}) == len(ids) and of_kind(graph_of(document), MODULATION).size == modulations.size
    plain = without_pooled(graph)
    assert plain.conservation_error.max() <= TOL.conservation_x64
    assert not of_kind(plain, MODULATION).size and plain.provenance.negative_words == ()


@pytest.fixture(scope="module")
def found():
    """Effects with one and four parts of the line, over two steps, and what they are of."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        pipe, tcs, _, span = made(jnp.float64, AWAY)
        output, feature = targets_in(pipe, tcs, span)
        engine = make_engine(span, tcs, (output,))
        rows = np.array([engine.sources, target_row(engine, feature)])
        return {parts: integrate(engine, rows, pipe, parts) for parts in (1, 4)}


@pytest.mark.slow
def test_modulations_of_all_evaluations_add_up_to_the_exchange_in_all(found):
    sizes = {parts: np.abs(one.edges).sum(axis=1) for parts, one in found.items()}
    errors = {parts: np.abs(one.remainder) / sizes[parts] for parts, one in found.items()}
    print("missed of the edges' sizes:", {parts: error.tolist() for parts, error in errors.items()})
    assert np.all(errors[4] <= TOL.conservation_x64) and np.all(errors[1] > 3 * errors[4])
    assert {*found[4].exchanged} == {PROMPT, NEGATIVE}


@pytest.mark.slow
@pytest.mark.parametrize("branch", [PROMPT, NEGATIVE])
def test_a_modulation_of_an_early_step_alone_is_an_intervention_on_both_steps(x64, found, branch):
    """A block's gate at step 1, by the bias of its projection there; step 2 starts where that leaves the latents."""
    pipe, tcs, run, span = made(jnp.float64, AWAY)
    output, model = targets_in(pipe, tcs, span)[0], pipe.transformer
    prompts = [encode(pipe, text, run.text_tokens) for text in (TEXT, AWAY)]
    empty, first = encode(pipe, "", run.text_tokens), span.traces[0].record.latents
    number, row, width = 1, 2, model.config.d_model
    conds = [
        model.embed(step_inputs(run, prompts[branch]._replace(pooled=pooled), first, 1), run.grid)[1]
        for pooled in (prompts[branch].pooled, empty.pooled)
    ]
    gates = [jax.vmap(lambda block, cond=cond: block.modulations(cond)[0])(model.single) for cond in conds]
    added = gates[1][number, row] - gates[0][number, row]
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.single.mod.bias[...] = changed.single.mod.bias.at[number, row * width : (row + 1) * width].add(added)
    run_one = jax.jit(lambda model, inputs: model(inputs, run.grid))

    def value(of_branch):
        z = first
        for step, models in ((1, of_branch), (2, [model, model])):
            pairs = zip(models, prompts, strict=True)
            velocities = [run_one(one, step_inputs(run, prompt, z, step)) for one, prompt in pairs]
            velocity = 2.5 * velocities[0] - 1.5 * velocities[1]
            if step == 2:
                return output_value(output, velocity, z)
            z = z + (float(run.sigmas[2]) - float(run.sigmas[1])) * velocity

    moved = value([model, model]) - value([changed if own == branch else model for own in (PROMPT, NEGATIVE)])
    places = found[1].places
    block = span.info.layout.firsts[1] + number
    mine = (places.step == 1) & (places.branch == branch) & (places.block == block) & (places.row == row)
    assert found[1].alone[0, mine] == pytest.approx([moved], rel=1e-7) and moved != 0


@pytest.mark.slow
def test_the_empty_negative_prompt_has_no_modulations_and_both_still_carry_latents_on():
    pipe, tcs, _, span = made(jnp.float32, "")
    graph = attribute(span, tcs, target=targets_in(pipe, tcs, span)[0], pipe=pipe, **SETTINGS)
    assert graph.conservation_error.max() <= TOL.conservation_f32
    kept = np.isin(graph.node_kind, (MODULATION, WORD))
    assert kept.any() and not graph.node_branch[kept].any() and {*graph.node_step[kept]} == {1, 2}
    ((path,), (told,)) = graph.provenance.pooled_path, graph.provenance.pooled
    assert told.total + told.remainder == pytest.approx(path.value - path.without, rel=1e-5)
    assert abs(told.remainder) <= 1e-3 * told.absolute and graph.provenance.negative_words == ()


def test_several_steps_of_one_evaluation_and_targets_in_both_of_them(x64):
    pipe, tcs, run, span = made(jnp.float64, None, 1.0)
    assert len(span.traces) == 2
    late, early = (strongest_feature(one, tcs, "img", 2) for one in (span, span.traces[0]))
    known = {prompt: encode(pipe, prompt, run.text_tokens) for prompt in (TEXT, "")}
    absent = pipe._replace(known=Embeddings("e.npz", pipe.source, known))
    graph = attribute(span, tcs, target=[(late, 1.0), (f"{early}#1", 1.0)], pipe=absent, **SETTINGS)
    assert graph.conservation_error.max() <= TOL.conservation_x64
    for path, one in zip(graph.provenance.pooled_path, graph.provenance.pooled, strict=True):
        assert one.total + one.remainder == pytest.approx(path.value - path.without, rel=1e-9)
        assert abs(one.remainder) <= 1e-3 * one.absolute
    # Embeddings from a file have no words; nothing of step 2 reaches a target of step 1.
    assert not of_kind(graph, WORD).size and graph.provenance.words == ()
    later = np.flatnonzero((graph.node_kind == MODULATION) & (graph.node_step == 2))
    assert later.size and not np.any(graph.node_step[graph.edge_target[np.isin(graph.edge_source, later)]] == 1)
