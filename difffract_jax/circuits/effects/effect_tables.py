"""Total effects (`total_effects`) summed over tokens: by feature, and by step and stream.

Effects of sources on one path overlap, so that sums over several steps or sites do not add up to the output's value;
those of one feature at many positions of one site do not act on one another, and add up to what all of them do.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from difffract_jax.address import BRANCHES, STREAMS, Layout
from difffract_jax.circuits.effects.total_effects import TotalEffects
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.transcoders.transcoder import TranscoderSet


def summed(
    found: TotalEffects, group: int, layers: Sequence[int], rows: Bool[np.ndarray, "rows"], features: int
) -> Float64[np.ndarray, "evaluation layer feat"]:
    """Sums the effects of every feature of a group over the tokens that count.

    Args:
        found: total effects of a run.
        group: its number.
        layers: of the group's stack.
        rows: which rows of its sequence count.
        features: of a transcoder.
    """
    effect = np.asarray(found.features[group], np.float64)[:, list(layers)] * rows[:, None]
    index = np.asarray(found.index[group])[:, list(layers)]
    total = np.zeros((len(effect), len(layers), features))
    evaluation, layer = np.indices(effect.shape)[:2]
    np.add.at(total, (evaluation, layer, index), effect)
    return total


class FeatureEffect(NamedTuple):
    """What a feature of one evaluation adds to an output.

    Attributes:
        feature: with its step, and of two branches its branch; with the positions that were counted, where an edit
            would act on others too.
        side: stream of its tokens, "img" or "txt".
        effect: summed over them; zeroing them moves the output by minus this, with attention and norms held.
    """

    feature: Feature
    side: str
    effect: float


def strongest(
    found: TotalEffects,
    tcs: TranscoderSet,
    inside: Bool[np.ndarray, "img"],
    own: Bool[np.ndarray, "*branch txt"],
    most: int,
    first: int = 0,
) -> list[FeatureEffect]:
    """Finds the features that add most to an output, of either sign, summed over positions.

    Args:
        found: total effects of a run.
        tcs: its transcoders.
        inside: image tokens that count.
        own: text tokens that count, the prompt's own; with guidance by two branches those of each.
        most: features to find.
        first: the first step traced.
    """
    best: list[FeatureEffect] = []
    layout = found.layout
    slots, branches = tcs.sites.slots(layout), found.branches
    for (group, side), (branch, words) in product(layout.sides, enumerate(np.atleast_2d(own))):
        blocks = list(slots[group])
        if not blocks:
            continue
        tokens = inside if side == "img" else words
        layers = [block - layout.blocks_of(group).start for block in blocks]
        total = summed(found, group, layers, counted_rows(layout, group, side, inside, words), tcs.config.features)
        total = total[branch::branches]
        order = np.argsort(-np.abs(total), axis=None, kind="stable")[:most]
        # An edit without positions acts at all image tokens, and at the prompt's own.
        alone = len(layout.groups[group].streams) == 1
        positions = None if alone and (side == "txt" or inside.all()) else _numbers(tokens)
        of = BRANCHES[branch] if branches > 1 else None
        for step, layer, number in zip(*np.unravel_index(order, total.shape), strict=True):
            site = layout.site_number(blocks[layer], STREAMS.index(side))
            at = Feature(*site, int(number), positions, (first + int(step),), None if alone else side, of)
            best.append(FeatureEffect(at, side, float(total[step, layer, number])))
    ranked = sorted(best, key=lambda one: -abs(one.effect))[:most]
    return [one for one in ranked if one.effect]


def counted_rows(
    layout: Layout, group: int, side: str, inside: Bool[np.ndarray, "img"], text: Bool[np.ndarray, "txt"]
) -> Bool[np.ndarray, "rows"]:
    """Marks the tokens that count of one side, in the order of a group's rows.

    Args:
        layout: of the model.
        group: its number.
        side: one of its streams.
        inside: image tokens that count.
        text: text tokens that count.
    """
    counted = {"img": inside, "txt": text}
    return np.concatenate([counted[stream] & (stream == side) for stream in layout.groups[group].streams])


def _numbers(tokens: Bool[np.ndarray, "token"]) -> tuple[int, ...]:
    return tuple(int(token) for token in np.flatnonzero(tokens))


class SideSums(NamedTuple):
    """What one stream's features and errors add to an output in one evaluation.

    Attributes:
        step: denoising step.
        branch: of guidance by two branches; None where a step is one evaluation.
        stream: label of the sites, as in img/3 or single/0.
        side: stream of the tokens.
        features: sum of their effects.
        errors: likewise; where an MLP has no transcoder, its whole output.
    """

    step: int
    branch: str | None
    stream: str
    side: str
    features: float
    errors: float


def side_sums(found: TotalEffects, inside: Bool[np.ndarray, "img"], first: int = 0) -> list[SideSums]:
    """Sums effects by step, of two branches also by branch, and stream.

    Args:
        found: total effects of a run.
        inside: image tokens that count; text tokens all do.
        first: the first step traced.
    """
    text = np.ones(found.text.shape[0], bool)
    rows: dict[tuple[int, str | None, str, str], SideSums] = {}
    branches = found.branches
    for number in range(found.features[0].shape[0]):
        step, branch = divmod(number, branches)
        for group, side in found.layout.sides:
            mask = counted_rows(found.layout, group, side, inside, text)
            features, errors = (np.asarray(one[group][number], np.float64) for one in (found.features, found.errors))
            sums = float(features.sum(axis=-1)[:, mask].sum()), float(errors[:, mask].sum())
            of = BRANCHES[branch] if branches > 1 else None
            key = first + step, of, found.layout.groups[group].label, side
            # Sites of one label may lie in several stacks.
            before = rows.get(key, SideSums(*key, 0.0, 0.0))
            rows[key] = SideSums(*key, before.features + sums[0], before.errors + sums[1])
    return list(rows.values())
