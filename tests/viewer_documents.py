"""A small document as circuit-tracer writes it, for tests of what reads such documents.

An embedding feeds feature 928 of layer 0, which feeds 57794 of layer 1 and the logit, to which that leads too; the
error of layer 0 feeds layer 1.
"""

from typing import Any

from difffract_jax.graphs.files.viewer_nodes import cantor

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"


def node(name: str, kind: str, layer: Any, column: int, feature: int | None, **more: Any) -> dict[str, Any]:
    """A node with no more than the schema requires, and what is given."""
    required = {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": column, "feature_type": kind}
    return required | {"jsNodeId": name, "clerp": ""} | more


def link(source: str, target: str, weight: Any) -> dict[str, Any]:
    """A link."""
    return {"source": source, "target": target, "weight": weight}


def document() -> dict[str, Any]:
    """The document, with what the schema requires alone."""
    return {
        "metadata": {"slug": "t", "scan": "gemma-2-2b", "prompt": "a b", "prompt_tokens": ["<bos>", "a", "b"]},
        "qParams": {},
        "nodes": [
            node("E_106_1", "embedding", "E", 1, 1),
            node("0_928_1", FEATURE, "0", 1, cantor(0, 928), activation=2.0),
            node("1_57794_1", FEATURE, "1", 1, cantor(1, 57794), activation=None, influence=None),
            node("0_0_1", ERROR, "0", 1, -1),
            node("27_5_2", "logit", "27", 2, 5, token_prob=0.9, is_target_logit=True),
        ],
        "links": [
            link("E_106_1", "0_928_1", 0.5),
            link("0_928_1", "1_57794_1", 1.5),
            link("0_0_1", "1_57794_1", 0.3),
            link("1_57794_1", "27_5_2", 2.0),
            link("0_928_1", "27_5_2", -0.2),
        ],
    }
