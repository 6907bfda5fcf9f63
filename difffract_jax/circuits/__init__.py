"""Circuits: from one denoising step of one run to a graph of features, and back to the model.

notation        how features and edits are written
trace           a run, recorded
frozen          the replacement of a trace, affine in its sources
attribution     a trace and a target become a graph (`difffract_jax.graphs`)
effects         heads, readings, total effects
editing         features found, and edited in the running model
checks          a graph held against its model

The names below are public: `from difffract_jax import circuits`, then `circuits.capture`. Loaded on first use.
"""

from difffract_jax.namespaces import lazy

_HOME = {
    "capture": "difffract_jax.circuits.trace.capture",
    "capture_steps": "difffract_jax.circuits.trace.capture",
    "Trace": "difffract_jax.circuits.trace.capture",
    "Span": "difffract_jax.circuits.trace.capture",
    "load_trace": "difffract_jax.circuits.trace.imported",
    "Feature": "difffract_jax.circuits.notation.feature",
    "Edit": "difffract_jax.circuits.notation.edits",
    "Supernode": "difffract_jax.circuits.notation.edits",
    "group_edit": "difffract_jax.circuits.notation.group_edits",
    "box_mask": "difffract_jax.circuits.notation.region",
    "read_mask": "difffract_jax.circuits.notation.region",
    "tokens_in": "difffract_jax.circuits.notation.region",
    "prepare": "difffract_jax.circuits.frozen.replacement",
    "replacement": "difffract_jax.circuits.frozen.replacement",
    "Replacement": "difffract_jax.circuits.frozen.replacement",
    "Targets": "difffract_jax.circuits.frozen.targets",
    "preactivations": "difffract_jax.circuits.frozen.targets",
    "pull_back": "difffract_jax.circuits.attribution.pullback",
    "pull_target": "difffract_jax.circuits.attribution.pullback",
    "push_forward": "difffract_jax.circuits.attribution.pullback",
    "strongest_feature": "difffract_jax.circuits.attribution.selection",
    "parse_target": "difffract_jax.circuits.attribution.outputs",
    "resolve_target": "difffract_jax.circuits.attribution.outputs",
    "make_engine": "difffract_jax.circuits.attribution.engine",
    "attribute": "difffract_jax.circuits.attribution.attribute",
    "plan_trace": "difffract_jax.circuits.attribution.plan",
    "score_gradients": "difffract_jax.circuits.attribution.score_gradients",
    "choose_scores": "difffract_jax.circuits.attribution.score_gradients",
    "removal_effects": "difffract_jax.circuits.attribution.score_gradients",
    "ScorePlace": "difffract_jax.circuits.attribution.score_sides",
    "score_edges": "difffract_jax.circuits.attribution.score_sides",
    "head_loadings": "difffract_jax.circuits.effects.attention",
    "score_parts": "difffract_jax.circuits.effects.attention",
    "carried": "difffract_jax.circuits.effects.heads",
    "scaled": "difffract_jax.circuits.effects.readings",
    "predict": "difffract_jax.circuits.effects.readings",
    "total_effects": "difffract_jax.circuits.effects.total_effects",
    "strongest": "difffract_jax.circuits.effects.effect_tables",
    "side_sums": "difffract_jax.circuits.effects.effect_tables",
    "rank_features": "difffract_jax.circuits.editing.ranking",
    "steer": "difffract_jax.circuits.editing.interventions",
    "steer_batch": "difffract_jax.circuits.editing.sweeps",
    "sweep": "difffract_jax.circuits.editing.sweeps",
    "capture_again": "difffract_jax.circuits.checks.rerun",
    "validate": "difffract_jax.circuits.checks.validation",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy(__name__, _HOME)
