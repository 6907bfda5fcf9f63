"""Which features to edit, chosen by rule, and the edits that move them.

1. A place is a feature at one step, on one side of its sequence: image tokens of the object, or text tokens of its
   phrase. `FeaturePlaces` lists all of a set of transcoders; a column of any table here is one place.
2. `mean_codes` measures every place in a run: the mean code over those tokens.
3. `circuit_effects` traces the circuit of an output over all steps and sums what every place adds to it.
4. A rule scores places; the first n are edited. `by_circuit` takes what moving a feature from its value in one run to
   its value in the other would add to the output, as the circuits of both runs tell; `by_contrast` the difference of
   the two codes, which is how features are chosen to steer with SAEs; `by_activation` the larger; `at_random` none.
5. `moves` turns places into edits that take each code from one run's towards the other's, by a strength: 1 takes it
   there. A code that falls is scaled, one that rises is added to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from difffract_jax.address import GROUPS, IMG, STREAMS
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.editing.ranking import summarise_site
from difffract_jax.circuits.effects.readings import node_effects
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.models.pipeline import Pipeline, encode, initial_noise
from difffract_jax.studies.cases import Material
from difffract_jax.studies.evaluations import plain_run, refuse_branches
from difffract_jax.transcoders.codes import reduced_codes, repeat_steps
from difffract_jax.transcoders.transcoder import TranscoderSet

SIDES = tuple((group, stream) for group in GROUPS for stream in group.streams)
"""The organism's groups of sites, each with every stream that its sequence holds."""
AT_ONCE = 32
"""Runs sampled together."""
NODES = 100
"""Features expanded in every circuit."""
Progress = Callable[[int, int], None]


class FeaturePlaces(NamedTuple):
    """Every place of a set of transcoders, one entry each.

    Attributes:
        group: index into `SIDES`.
        step: denoising step.
        site: index among the group's sites with a transcoder.
        block: number of the site, as addresses have it.
        feature: of its transcoder.
    """

    group: Int[np.ndarray, "place"]
    step: Int[np.ndarray, "place"]
    site: Int[np.ndarray, "place"]
    block: Int[np.ndarray, "place"]
    feature: Int[np.ndarray, "place"]

    @property
    def is_image(self) -> Bool[np.ndarray, "place"]:
        """Whether a place lies on image tokens."""
        return np.array([side == "img" for _, side in SIDES])[self.group]

    def feature_at(
        self, place: int | np.integer, image: tuple[int, ...] | None = None, text: tuple[int, ...] | None = None
    ) -> Feature:
        """Returns the feature of a place with its step and positions.

        Without positions a feature of a site of two streams is that of both sides: `is_image` tells the place's own.

        Args:
            place: the place.
            image: image tokens of the object; all if left out.
            text: text tokens of its phrase; all if left out.
        """
        group, side = SIDES[int(self.group[place])]
        positions = image if side == "img" else text
        return Feature(
            group.label,
            int(self.block[place]),
            int(self.feature[place]),
            positions,
            (int(self.step[place]),),
            side if len(group.streams) > 1 and positions is not None else None,
        )


def all_places(tcs: TranscoderSet, steps: int) -> FeaturePlaces:
    """Lists the places of a set of transcoders.

    Args:
        tcs: the transcoders, or SAEs.
        steps: denoising steps.
    """
    columns: list[np.ndarray] = []
    for number, (group, _) in enumerate(SIDES):
        layers = np.array(tcs.sites.groups.get(group.name, ()), np.int64)
        step, site, feature = (
            a.ravel() for a in np.indices((steps, len(layers), tcs.config.features if len(layers) else 0))
        )
        columns.append(
            np.stack([np.full(step.size, number), step, site, layers[site] if layers.size else site, feature])
        )
    return FeaturePlaces(*np.concatenate(columns, axis=1))


def mean_codes(
    pipe: Pipeline, tcs: TranscoderSet, material: Material, prompts: Sequence[str], progress: Progress | None = None
) -> Float[np.ndarray, "case place"]:
    """Measures the mean code of every place, in a run of each case's noise.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs.
        material: the cases.
        prompts: of the runs, one per case.
        progress: called with (runs done, runs in all).

    Raises:
        UserError: if the pipeline's guidance makes two evaluations a step.
    """
    run, rows = plain_run(pipe), len(prompts)
    encoded = {text: encode(pipe, text, run.text_tokens) for text in dict.fromkeys(prompts)}
    found = []
    for first in range(0, rows, AT_ONCE):
        at = np.arange(first, first + AT_ONCE) % rows
        text, pooled = (
            jnp.stack([getattr(encoded[prompts[row]], name) for row in map(int, at)]) for name in ("text", "pooled")
        )
        noise = jnp.stack([initial_noise(pipe, run, material.cases[row].seed) for row in at])
        extra = repeat_steps((material.inside[at], material.phrase[at]), run.steps)
        kept, _ = reduced_codes(pipe, tcs, run, text, pooled, noise, summarise_site, extra)
        sides = [np.asarray(kept[group.name][side].inside) for group, side in SIDES if group.name in kept]
        flat = [np.moveaxis(one, 1, 0).reshape(AT_ONCE, -1) for one in sides]
        found.append(np.concatenate(flat, axis=1)[: rows - first])
        if progress is not None:
            progress(min(first + AT_ONCE, rows), rows)
    return np.concatenate(found)


def circuit_of(pipe: Pipeline, tcs: TranscoderSet, prompt: str, seed: int, target: str) -> Graph:
    """Traces the circuit of an output over all steps.

    Args:
        pipe: the pipeline.
        tcs: its transcoders.
        prompt: of the run.
        seed: of its starting noise.
        target: as text, see `outputs`.

    Raises:
        UserError: if the pipeline's guidance makes two evaluations a step.
    """
    span = capture_steps(pipe, tcs, prompt, first=0, last=plain_run(pipe).steps - 1, seed=seed)
    asked = parse_target(target)
    assert not isinstance(asked, Feature)
    output = resolve_target(pipe, span, asked)
    return attribute(span, tcs, target=output, max_nodes=NODES, expansion_batch=NODES, min_attribution=1e-5)


def circuit_effects(
    graph: Graph, places: FeaturePlaces, inside: Bool[np.ndarray, "img"], phrase: Bool[np.ndarray, "txt"]
) -> Float64[np.ndarray, "place"]:
    """Sums what the features of a circuit add to its target, place by place (`readings.node_effects`).

    Args:
        graph: position by position.
        places: of the transcoders.
        inside: image tokens that count.
        phrase: text tokens that count.

    Raises:
        UserError: if the graph has two evaluations a step.
    """
    refuse_branches(np.unique(graph.node_branch).size)
    layout = graph.provenance.layout
    counts = np.zeros(max(inside.size, phrase.size), bool), np.zeros(max(inside.size, phrase.size), bool)
    counts[0][: inside.size], counts[1][: phrase.size] = inside, phrase
    image = graph.node_stream == IMG
    here = (graph.node_kind == FEATURE) & np.where(
        image, counts[0][graph.node_position], counts[1][graph.node_position]
    )
    number = {(group.label, stream): side for side, (group, stream) in enumerate(SIDES)}
    sides, blocks = np.full(graph.node_kind.size, -1), np.full(graph.node_kind.size, -1)
    for node in np.flatnonzero(here):
        label, blocks[node] = layout.site_number(int(graph.node_block[node]), int(graph.node_stream[node]))
        sides[node] = number[label, STREAMS[graph.node_stream[node]]]
    keys = [sides, graph.node_step, blocks, graph.node_feature]
    wanted = np.stack([np.asarray(key, np.int64)[here] for key in keys], axis=1)
    table = {key: place for place, key in enumerate(zip(*(a.tolist() for a in _keys(places)), strict=True))}
    total = np.zeros(places.feature.size)
    np.add.at(total, [table[tuple(key)] for key in wanted.tolist()], node_effects(graph)[here])
    return total


def _keys(places: FeaturePlaces) -> tuple[np.ndarray, ...]:
    return places.group, places.step, places.block, places.feature


def by_circuit(
    before: Float[np.ndarray, "place"],
    after: Float[np.ndarray, "place"],
    effect_before: Float64[np.ndarray, "place"],
    effect_after: Float64[np.ndarray, "place"],
) -> Float64[np.ndarray, "place"]:
    """Scores places by what moving their codes from one run's to the other's adds to the output, as circuits tell.

    A code that a run holds at v with effect e adds e (w / v - 1) when it is moved to w. Where both runs hold the code
    the two circuits each have an answer, and their mean counts.

    Args:
        before: codes of the run that is edited.
        after: codes of the other.
        effect_before: of each place on the output, in the run that is edited.
        effect_after: in the other.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ahead = np.where(before > 0, effect_before * (after / before - 1), np.nan)
        back = np.where(after > 0, effect_after * (1 - before / after), np.nan)
    answers = np.stack([ahead, back])
    known = np.isfinite(answers)
    return np.where(known, answers, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def by_contrast(before: Float[np.ndarray, "place"], after: Float[np.ndarray, "place"]) -> Float64[np.ndarray, "place"]:
    """Scores places by the difference of the two runs' codes."""
    return np.abs(after.astype(np.float64) - before)


def by_activation(
    before: Float[np.ndarray, "place"], after: Float[np.ndarray, "place"]
) -> Float64[np.ndarray, "place"]:
    """Scores places by the larger of the two runs' codes."""
    return np.maximum(before, after).astype(np.float64)


def at_random(
    before: Float[np.ndarray, "place"], after: Float[np.ndarray, "place"], rng: np.random.Generator
) -> Float64[np.ndarray, "place"]:
    """Scores places that are active in either run at random."""
    return np.where((before > 0) | (after > 0), rng.uniform(0.0, 1.0, before.shape), 0.0)


def first(scores: Float64[np.ndarray, "place"], count: int) -> Int[np.ndarray, "chosen"]:
    """Returns the places of the highest scores above 0, highest first.

    Args:
        scores: of every place.
        count: at most so many.
    """
    order = np.argsort(-scores, kind="stable")[:count]
    return order[scores[order] > 0]


def moves(
    places: FeaturePlaces,
    chosen: Int[np.ndarray, "chosen"],
    before: Float[np.ndarray, "place"],
    after: Float[np.ndarray, "place"],
    strength: float,
    inside: Bool[np.ndarray, "img"],
    phrase: Bool[np.ndarray, "txt"],
) -> list[Edit]:
    """Returns edits that take codes from one run's towards the other's.

    Args:
        places: of the transcoders.
        chosen: which to edit.
        before: codes of the run that is edited.
        after: codes of the other.
        strength: share of the way; 1 takes a code's mean there.
        inside: image tokens to edit at.
        phrase: text tokens to edit at.
    """
    image, text = (tuple(map(int, np.flatnonzero(mask))) for mask in (inside, phrase))
    edits = []
    for place in map(int, chosen):
        feature, old, new = places.feature_at(place, image, text), float(before[place]), float(after[place])
        if new < old:
            edits.append(Edit(feature, "scale", 1 - strength * (1 - new / old)))
        else:
            edits.append(Edit(feature, "add", strength * (new - old)))
    return edits


def removals(
    places: FeaturePlaces,
    chosen: Int[np.ndarray, "chosen"],
    strength: float,
    inside: Bool[np.ndarray, "img"],
    phrase: Bool[np.ndarray, "txt"],
) -> list[Edit]:
    """Returns edits that take features away: 1 zeroes them, 2 inverts them.

    Args:
        places: of the transcoders.
        chosen: which to edit.
        strength: times the code, subtracted from it.
        inside: image tokens to edit at.
        phrase: text tokens to edit at.
    """
    image, text = (tuple(map(int, np.flatnonzero(mask))) for mask in (inside, phrase))
    return [Edit(places.feature_at(int(place), image, text), "scale", 1 - strength) for place in chosen]
