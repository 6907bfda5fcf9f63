"""Names of nodes, one each, that people and files can use: img/2/f401@12, error img/2, input txt, pixels:color=red;
double/1/h1@img12,txt4 is an attention score, of a head, the token that attends and the one attended to; img/2/mlp_gate
a modulation; `word red@2` a token of the prompt, at its place in CLIP's sequence.

A feature is written as in `feature`, so that it can be a target: single/0/f7@img3 in a single-stream block, where the
stream stays once positions are summed over; the step only where the graph has several. Where a graph has the negative
branch of guidance by two branches, names end in the branch, img/3/f401~negative and img/3/f401~prompt. A document that
does not tell which blocks its model has gets all of them numbered through the model. A target that shares its name with
another node, once positions are summed over, is marked.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from difffract_jax.address import BRANCHES, LATENT, STREAMS, Layout
from difffract_jax.config import UserError
from difffract_jax.graphs.arrays import FEATURE, INPUT, KINDS, MODULATION, OUTPUT, SCORE, WORD, GraphArrays


def node_names(graph: GraphArrays) -> list[str]:
    """Returns the name of every node; no two are alike."""
    marks = _Marks.of(graph)
    names = [_name(graph, node, marks) for node in range(graph.node_kind.size)]
    targets, often = graph.targets.size, Counter(names)
    names = [f"{name} (target)" if node < targets and often[name] > 1 else name for node, name in enumerate(names)]
    seen: Counter[str] = Counter()
    for node, name in enumerate(names):
        seen[name] += 1
        names[node] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def node_name(graph: GraphArrays, node: int) -> str:
    """Returns the name of one node, without the mark that tells it from another of the same name."""
    return _name(graph, node, _Marks.of(graph))


class _Marks(NamedTuple):
    """What names must tell besides the place: steps and branches, where a graph has several."""

    steps: bool
    branches: bool

    @staticmethod
    def of(graph: GraphArrays) -> "_Marks":
        return _Marks(np.unique(graph.node_step).size > 1, bool(graph.node_branch.any()))

    def mark(self, graph: GraphArrays, node: int) -> str:
        """Returns the end of a node's name: #1, ~negative, #1~negative or nothing."""
        kind = graph.node_kind[node]
        step = f"#{graph.node_step[node]}" if self.steps and kind not in (INPUT, WORD) else ""
        branch = branch_name(graph, node) if self.branches else ""
        return step + (f"~{branch}" if branch else "")


def branch_name(graph: GraphArrays, node: int) -> str:
    """Returns the branch of guidance that a node is of; "" for outputs and latents, which are of both."""
    shared = graph.node_kind[node] == OUTPUT or graph.node_stream[node] == LATENT
    return "" if shared else BRANCHES[graph.node_branch[node]]


def evaluation_marks(graph: GraphArrays) -> list[str]:
    """Returns of every node the end of its name that tells step and branch; "" where the graph has one of each."""
    marks = _Marks.of(graph)
    return [marks.mark(graph, node) for node in range(graph.node_kind.size)]


def _name(graph: GraphArrays, node: int, marks: _Marks) -> str:
    kind, step = int(graph.node_kind[node]), marks.mark(graph, node)
    if kind == OUTPUT:
        settings = graph.provenance.attribution
        asked = f"output {node}" if settings is None else settings.target
        return f"{asked if isinstance(asked, str) else asked[node]}{step}"
    if kind == SCORE:
        return score_name(graph, node) + step
    if kind == WORD:
        known = graph.provenance
        place, words = int(graph.node_feature[node]), (known.words, known.negative_words)[graph.node_branch[node]]
        return f"word {words[place]}@{place}{step}" if place < len(words) else f"word @{place}{step}"
    columns = graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature
    kind, stream, block, position, feature = (int(column[node]) for column in columns)
    return place_name(kind, stream, block, position, feature, graph.provenance.known.layout) + step


def score_name(graph: GraphArrays, node: int, *, summed: bool = False) -> str:
    """Returns how an attention score is called, without its step; "other scores double/1" for the rest of a block's.

    Args:
        graph: the graph.
        node: a score.
        summed: as if positions were summed over: double/1/h1@img,txt.
    """
    layout, block = graph.provenance.known.layout, int(graph.node_block[node])
    place = f"block {block}" if layout is None else layout.block_name(block)
    if graph.node_head[node] < 0:
        return f"other scores {place}"
    tokens = []
    for stream, position in (
        (graph.node_stream[node], graph.node_position[node]),
        (graph.node_key_stream[node], graph.node_key_position[node]),
    ):
        tokens.append(STREAMS[stream] + (f"{position}" if position >= 0 and not summed else ""))
    return f"{place}/h{graph.node_head[node]}@{','.join(tokens)}"


def place_name(kind: int, stream: int, block: int, position: int, feature: int, layout: Layout | None) -> str:
    """Returns how a source is called by where it lies, without its step.

    Args:
        kind: of the node; no output, score or word.
        stream: of the node.
        block: of the model; -1 for inputs.
        position: within the stream; -1 where positions are summed over.
        feature: of a modulation its row; -1 for other kinds.
        layout: of the model; None where it is not known, so that blocks are numbered through the model.
    """
    site, side = STREAMS[stream], ""
    if kind == MODULATION and layout is not None:
        return layout.modulation_name(block, stream, feature)
    if kind == MODULATION:
        return f"modulation {site}/{block}/{feature}"
    if kind != INPUT:
        site = f"{site}/{block}" if layout is None else layout.site_name(block, stream)
        side = (layout and layout.side(block, stream)) or ""
    name = f"{site}/f{feature}" if kind == FEATURE else f"{KINDS[kind]} {site}"
    number = f"{position}" if position >= 0 else ""
    return f"{name}{f'@{side}{number}' if side or number else ''}"


def feature_names(graph: GraphArrays) -> list[str]:
    """Returns of every feature the name that labels and commands know it by, img/3/f401; "" for other nodes."""
    layout, names = graph.provenance.known.layout, []
    for node in range(graph.node_kind.size):
        if graph.node_kind[node] != FEATURE:
            names.append("")
            continue
        block, stream = int(graph.node_block[node]), int(graph.node_stream[node])
        site = f"{STREAMS[stream]}/{block}" if layout is None else layout.site_name(block, stream)
        names.append(f"{site}/f{graph.node_feature[node]}")
    return names


def find_nodes(graph: GraphArrays, names: Sequence[str]) -> Int64[np.ndarray, "name"]:
    """Returns the nodes of some names.

    Args:
        graph: the graph.
        names: from `node_names`.

    Raises:
        UserError: naming the first that no node has, and the nearest that one has.
    """
    number = {name: node for node, name in enumerate(node_names(graph))}
    for name in names:
        if name not in number:
            close = difflib.get_close_matches(name, list(number), n=1)
            hint = (
                f"did you mean `{close[0]}`?" if close else "write it as in `img/2/f401`, as `export` to csv lists it."
            )
            raise UserError(f"The graph has no node `{name}`; {hint}")
    return np.array([number[name] for name in names], np.int64)
