"""Nodes of a graph as viewers' documents hold them: where they stand, what they are called (docs/viewers.md).

1. Columns: text positions first, then image positions, then latents, step beside step; one per stream where positions
   are summed over, which is how graphs of images are best exported.
2. A dictionary's number is k = 2 * block + (0 txt | 1 img), so that features of the two streams never share a file of
   examples; a feature's integer is Cantor's pairing of k and its index. Names that links use: `k_feature_column` for
   features, `E_stream_column` for inputs (0 txt, 1 img, 2 latent), `err_img_3_2` and `rest_img_3_2` for errors and
   unexpanded features, `K_i_column` for the i-th target, a logit to the viewers, with K past every k.
3. What people read, `clerp`: a feature's label; without one its name, and the word or patch at which it is strongest.
4. Every node also carries `difffract`, its kind, step, stream, block, position and feature, for `viewer_graph`; an
   attention score also its head, and stream and position of its key. To the viewers it is an error, labelled by head;
   so is a modulation, by name, and a word is an input.
   `name`, as commands know it, is for `viewer_groups`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from difffract_jax.address import BRANCHES, IMG, LATENT, PROMPT, STREAMS, TXT
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, MODULATION, OUTPUT, SCORE, WORD, Graph
from difffract_jax.graphs.names import feature_names, node_name, node_names, score_name
from difffract_jax.graphs.pruning import cumulative_shares, node_influence

FEATURE_TYPE = "cross layer transcoder"
"""What the viewers call features, those of one layer's transcoder too."""
STREAM_CODE = {TXT: 0, IMG: 1, LATENT: 2}
IDENTITY = ("node_kind", "node_step", "node_stream", "node_block", "node_position", "node_feature")
"""Columns of a node's identity; in a graph with the negative branch of guidance its branch comes behind."""
SCORE_IDENTITY = ("node_head", "node_key_stream", "node_key_position")
WORD_BEGIN = "\u2581"
"""Beginning of a word, in tokens of T5."""
MARKUP = str.maketrans({"<": "\u2039", ">": "\u203a"})
"""Characters that open markup and close it, and what is written for them (trap 14)."""


def cantor(k: int, feature: int) -> int:
    """Returns the viewers' integer of a feature: Cantor's pairing of its dictionary and its index."""
    return (k + feature) * (k + feature + 1) // 2 + feature


def dictionary_number(block: int, stream: int) -> int:
    """Returns k, the viewers' number of a site's dictionary; stream 0 is img, 1 txt."""
    return 2 * block + STREAM_CODE[stream]


def columns_of(graph: Graph, text: Sequence[str]) -> tuple[list[str], Int64[np.ndarray, "node"]]:
    """Returns the head of every column, and the column of every node; outputs stand in the last one of their step.

    With guidance by two branches each has columns of its own, but for the latents and outputs, which are of both.

    Args:
        graph: as it is shown, summed over positions or not.
        text: tokens of the text; without one for a position its number stands there.
    """
    code = np.array([STREAM_CODE[stream] for stream in range(len(STREAMS))])[graph.node_stream]
    branch = graph.node_branch.tolist()
    keys = list(zip(graph.node_step.tolist(), branch, code.tolist(), graph.node_position.tolist(), strict=True))
    output = (graph.node_kind == OUTPUT).tolist()
    used = {key for key, is_output in zip(keys, output, strict=True) if not is_output}
    # Both streams at every step: features in a column each never fill two thirds of them (trap 4).
    missing = {(*key[:2], c, -1) for key in keys for c in (0, 1)} - {(*key[:3], -1) for key in used}
    columns = sorted(used | missing)
    number = {key: place for place, key in enumerate(columns)}
    last = {column[0]: place for place, column in enumerate(columns)}
    grid = graph.provenance.known.grid
    several, branches = len(last) > 1, any(branch)
    texts = text, graph.provenance.known.negative_tokens
    heads = [place_text(c, position, texts[b], grid) for _, b, c, position in columns]
    tokens = [
        head + (f"#{step}" if several else "") + (f"~{BRANCHES[b]}" if branches and c != STREAM_CODE[LATENT] else "")
        for head, (step, b, c, _) in zip(heads, columns, strict=True)
    ]
    places = [last[key[0]] if is_output else number[key] for key, is_output in zip(keys, output, strict=True)]
    return tokens, np.array(places, np.int64)


def place_text(code: int, position: int, text: Sequence[str], grid: Sequence[int] | None) -> str:
    """Returns what a position is called: a word, or the row and column of a patch; the stream for all of them.

    Args:
        code: of the stream, from `STREAM_CODE`.
        position: within the stream; -1 for a sum over positions.
        text: tokens of the text.
        grid: rows and columns of image tokens, where they are known.
    """
    stream = ("txt", "img", "latent")[code]
    if position < 0:
        return stream
    if code == 0:
        return text[position].translate(MARKUP) if position < len(text) else f"txt[{position}]"
    return f"{stream}[{position // grid[1]},{position % grid[1]}]" if grid else f"{stream}[{position}]"


def shown_names(graph: Graph, labels: Mapping[str, str], text: Sequence[str]) -> list[str]:
    """Returns what people read of every feature: its label, or its name and where it is strongest; "" for other nodes.

    Args:
        graph: as it is shown.
        labels: of features, img/3/f401, or of nodes, img/3/f401@12, by their names.
        text: tokens of the text.

    Example:
        Without a label `img/3/f401 · img[4,7]`, strongest at row 4 and column 7, or `txt/1/f7 · circle`.
    """
    shown = []
    for node, (name, feature) in enumerate(zip(node_names(graph), feature_names(graph), strict=True)):
        if not feature:
            shown.append("")
            continue
        label = labels.get(name) or labels.get(feature)
        place = "" if label else _strongest(graph, node, text)
        shown.append((label or f"{feature}{place and f' · {place}'}").translate(MARKUP))
    return shown


def _strongest(graph: Graph, node: int, text: Sequence[str]) -> str:
    """Returns where a feature is strongest, "" where the graph does not tell."""
    position = int(graph.node_position[node])
    start, end = (int(place) for place in graph.map_indptr[node : node + 2])
    if position < 0:
        if start == end:
            return ""
        position = int(graph.map_position[start + np.argmax(np.abs(graph.map_value[start:end]))])
    text = text if graph.node_branch[node] == PROMPT else graph.provenance.known.negative_tokens
    code = STREAM_CODE[int(graph.node_stream[node])]
    place = place_text(code, position, text, graph.provenance.known.grid)
    return place.replace(WORD_BEGIN, " ").strip() or place


def viewer_nodes(
    graph: Graph, column: Int64[np.ndarray, "node"], text: Sequence[str], options: ViewerOptions
) -> list[dict[str, Any]]:
    """Returns the document's nodes, in the order of the graph's.

    Args:
        graph: as it is shown.
        column: of every node.
        text: tokens of the text.
        options: how it is shown.

    Raises:
        UserError: if it has nothing besides targets and inputs, which the viewers cannot show.
    """
    names, targets = node_names(graph), graph.targets.size
    inner = np.arange(graph.node_kind.size) >= targets
    numbered = graph.node_block[inner & (graph.node_block >= 0)]
    if not numbered.size:  # trap 3
        raise UserError("The graph has no features or errors besides its targets, which the viewers cannot show.")
    shift = int(numbered.max() == 0)  # trap 3 again: a highest layer of 0 counts as none
    top, past = int(numbered.max()) + shift + 1, 2 * int(graph.node_block.max()) + 2
    shares = graph.node_cumulative
    if np.isnan(shares).any():
        shares = cumulative_shares(node_influence(graph))
    shown, nodes = shown_names(graph, options.labels, text), []
    for node in range(graph.node_kind.size):
        common = {
            "ctx_idx": int(column[node]),
            "clerp": shown[node],
            "influence": short(shares[node]),
            "activation": short(graph.node_value[node]) if graph.node_kind[node] in (FEATURE, SCORE) else None,
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        if node < targets:
            own = _target(graph, node, int(column[node]), top, past, names[node])
        else:
            own = _source(graph, node, int(column[node]), shift, options)
            if "clerp" in own:
                own["clerp"] = options.labels.get(names[node], own["clerp"]).translate(MARKUP)
        more = SCORE_IDENTITY if graph.node_kind[node] == SCORE else ()
        more = ("node_branch", *more) if graph.node_branch.any() else more
        identity = [int(getattr(graph, name)[node]) for name in (*IDENTITY, *more)]
        told = {"name": names[node], "difffract": identity}
        nodes.append({**own, **{k: v for k, v in common.items() if k not in own}, **told})
    return nodes


def _target(graph: Graph, node: int, column: int, top: int, past: int, name: str) -> dict[str, Any]:
    """Returns what is a target's own: a logit to the viewers, whose label must hold its share (trap 2)."""
    share = float(graph.root_weights[node])
    return {
        "node_id": f"{past}_{node}_{column}",
        "feature": node,
        "layer": str(top),
        "feature_type": "logit",
        "jsNodeId": f"L_{node}-{column}",
        "clerp": f'Output "{name.translate(MARKUP)}" (p={share:.3f})',
        "influence": None,
        "token_prob": share,
        "is_target_logit": node == 0,
    }


def _source(graph: Graph, node: int, column: int, shift: int, options: ViewerOptions) -> dict[str, Any]:
    """Returns what is a feature's, an error's or an input's own; `feature` is always an integer (trap 6)."""
    kind, stream, block = int(graph.node_kind[node]), int(graph.node_stream[node]), int(graph.node_block[node])
    if kind == INPUT:
        name = f"E_{STREAM_CODE[stream]}"
        return {
            "node_id": f"{name}_{column}",
            "feature": column,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"{name}-{column}",
        }
    layer = str(block + shift)
    if kind in (MODULATION, WORD):
        return _of_pooled(graph, node, column, layer)
    if kind == FEATURE:
        k, feature = dictionary_number(block, stream), int(graph.node_feature[node])
        link = {"vis_link": f"{options.dashboard}/{STREAMS[stream]}_{block}/{feature}"} if options.dashboard else {}
        return {
            "node_id": f"{k}_{feature}_{column}",
            "feature": cantor(k, feature),
            "layer": layer,
            "feature_type": FEATURE_TYPE,
            "jsNodeId": f"{k}_{feature}-0",
        } | link
    if kind == SCORE:
        return _score(graph, node, f"{STREAMS[stream]}_{block}_{column}", layer)
    # Four parts, so that no error is taken for a feature (traps 1 and 5); -1 and -2, so that the two kinds are not
    # taken for one feature that is everywhere (trap 4).
    name = f"{'err' if kind == ERROR else 'rest'}_{STREAMS[stream]}_{block}_{column}"
    return {
        "node_id": name,
        "feature": -1 if kind == ERROR else -2,
        "layer": layer,
        "feature_type": "mlp reconstruction error",
        "jsNodeId": name,
        "clerp": f"{'Err' if kind == ERROR else 'Rest'}: {STREAMS[stream]} L{block}",
    }


def _score(graph: Graph, node: int, place: str, layer: str) -> dict[str, Any]:
    """Returns what is an attention score's own; an integer for each head, so that none is a feature (trap 4)."""
    head, key = int(graph.node_head[node]), f"{STREAMS[graph.node_key_stream[node]]}{graph.node_key_position[node]}"
    name = f"attn_{head}_{key}_{place}"
    return {
        "node_id": name,
        "feature": -4 - head,
        "layer": layer,
        "feature_type": "mlp reconstruction error",
        "jsNodeId": name,
        "clerp": f"Attention: {score_name(graph, node)}",
    }


def _of_pooled(graph: Graph, node: int, column: int, layer: str) -> dict[str, Any]:
    """Returns what is a modulation's or a word's own; an integer for each modulation, below those of scores."""
    stream, row = STREAMS[graph.node_stream[node]], int(graph.node_feature[node])
    if graph.node_kind[node] == WORD:
        name = f"W_{row}"
        own = {"feature": row, "layer": "E", "feature_type": "embedding", "jsNodeId": f"{name}-{column}"}
        return {"node_id": f"{name}_{column}", **own, "clerp": node_name(graph, node)}
    name = f"mod_{row}_{stream}_{layer}_{column}"
    own = {"feature": -1000 - row, "layer": layer, "feature_type": "mlp reconstruction error", "jsNodeId": name}
    return {"node_id": name, **own, "clerp": f"Modulation: {node_name(graph, node)}"}


def padded(tokens: list[str], nodes: list[dict[str, Any]]) -> list[str]:
    """Returns the columns' heads, with empty columns added until no feature fills two thirds of them (trap 4).

    Args:
        tokens: heads of the columns that nodes stand in.
        nodes: of the document.
    """
    often = Counter((n["layer"], n["feature"], n["ctx_idx"] if "error" in n["feature_type"] else -1) for n in nodes)
    wanted = -(-3 * max(often.values()) // 2)
    return tokens + [" "] * max(0, wanted - len(tokens))


def short(value: Any) -> float:
    """Returns the shortest decimal number that is this one in float32."""
    return float(str(np.float32(value)))
