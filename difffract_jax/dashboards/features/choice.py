"""Which examples a feature's page shows: the prompts of its largest peaks, and some of each third of the others.

The others are the uniform sample of prompts in which the feature is active, without those that are shown already. They
are sorted by their peaks and cut into thirds, and of each third as many are taken as `per_third`, evenly spaced.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from difffract_jax.dashboards.features.record import TIERS
from difffract_jax.dashboards.features.state import LAST, FeatureState


class Examples(NamedTuple):
    """Examples of features; as many places as are shown at most, -1 as the prompt of those that are empty.

    Attributes:
        prompt: its number.
        place: step * rows + row of the peak.
        value: the peak.
        tier: code in `TIERS`.
    """

    prompt: Int[np.ndarray, "*features shown"]
    place: Int[np.ndarray, "*features shown"]
    value: Float[np.ndarray, "*features shown"]
    tier: UInt8[np.ndarray, "*features shown"]


def choose(state: FeatureState, per_third: int) -> Examples:
    """Chooses the examples of one site's features.

    Args:
        state: of the site, as NumPy arrays without the axis of sites.
        per_third: examples of each third.
    """
    none = state.top_value <= 0
    prompts = [np.where(none, -1, state.top_prompt)]
    places, values = [state.top_place], [np.where(none, 0, state.top_value)]
    shown = (state.sample_prompt[:, :, None] == prompts[0][:, None, :]).any(axis=2)
    left = (state.sample_rank < LAST) & ~shown
    order = np.argsort(np.where(left, state.sample_value, np.inf), axis=1, kind="stable")
    count = left.sum(axis=1)
    lowest = count + 1
    for third in (2, 1, 0):
        inside = (third + (np.arange(per_third)[::-1] + 0.5) / per_third) / 3
        index = np.floor(inside[None] * count[:, None]).astype(np.int64)
        # Of fewer examples than places some would be taken twice.
        again = np.concatenate([np.zeros((len(index), 1), bool), index[:, 1:] == index[:, :-1]], axis=1)
        again |= index >= lowest[:, None]
        lowest = index[:, -1]
        at = np.take_along_axis(order, np.minimum(index, order.shape[1] - 1), axis=1)
        empty = again | (count == 0)[:, None]
        prompts.append(np.where(empty, -1, np.take_along_axis(state.sample_prompt, at, axis=1)))
        places.append(np.take_along_axis(state.sample_place, at, axis=1))
        values.append(np.where(empty, 0, np.take_along_axis(state.sample_value, at, axis=1)))
    tiers = np.repeat(np.arange(len(TIERS)), [prompts[0].shape[1], *(per_third,) * 3]).astype(np.uint8)
    prompt = np.concatenate(prompts, axis=1)
    place = np.where(prompt < 0, 0, np.concatenate(places, axis=1))
    return Examples(
        prompt.astype(np.int32),
        place.astype(np.int32),
        np.concatenate(values, axis=1).astype(np.float32),
        np.broadcast_to(tiers, prompt.shape).copy(),
    )
