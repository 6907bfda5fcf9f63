"""Sums of total effects over tokens: nothing is lost, and the strongest are the largest of all."""

from collections import defaultdict
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.effects.effect_tables import side_sums, strongest, summed
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.models.tiny import random_pipeline
from traces import IMAGE, make_transcoders

TEXT = 4


@cache
def run():
    pipe = random_pipeline(seed=4, dtype=jnp.float64)
    tcs = make_transcoders(pipe.config.transformer, seed=4, img=(0, 2), txt=(1,), joint=(0, 1), skip=True, features=16)
    span = capture_steps(
        pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(height=16, width=16, text_tokens=TEXT)
    )
    found = total_effects(span, tcs, resolve_target(pipe, span, parse_target("pixels:color=red,box=0,0,8,8")))
    return tcs, found, np.asarray(span.traces[0].record.replaceable_text)


@pytest.fixture
def made(x64):
    return run()


def by_hand(found, inside):
    """Adds effects up one by one: (stream, block, feature, step, side) -> sum."""
    sums = defaultdict(float)
    for group, name in enumerate(("img", "txt", "single")):
        effects, index = (np.asarray(one[group]) for one in (found.features, found.index))
        for (step, layer, row, _), effect, number in zip(
            np.ndindex(effects.shape), effects.flat, index.flat, strict=True
        ):
            side = name if name != "single" else "txt" if row < TEXT else "img"
            token = row - TEXT if name == "single" and side == "img" else row
            if side == "txt" or inside[token]:
                sums[name, layer, int(number), step + 1, side] += float(effect)
    return sums


@pytest.mark.parametrize("region", [False, True])
def test_the_strongest_features_are_the_largest_sums(made, region):
    tcs, found, own = made
    inside = np.ones(found.noise.shape[0], bool)
    inside[::2] = not region
    expected = by_hand(found, inside)
    rows = strongest(found, tcs, inside, own, 10, first=1)
    largest = sorted(map(abs, expected.values()), reverse=True)[:10]
    assert [abs(row.effect) for row in rows] == pytest.approx(largest, rel=1e-9)
    streams = set()
    for feature, side, effect in strongest(found, tcs, inside, own, 10**4, first=1):
        key = feature.stream, feature.block, feature.feature, feature.steps[0], side
        assert effect == pytest.approx(expected[key], rel=1e-9) and effect != 0
        tokens = inside if side == "img" else own
        whole = feature.stream == "txt" or (feature.stream == "img" and not region)
        assert feature.positions == (None if whole else tuple(np.flatnonzero(tokens)))
        assert feature.side == (side if feature.stream == "single" else None)
        streams.add((feature.stream, side))
    assert streams == {("img", "img"), ("txt", "txt"), ("single", "txt"), ("single", "img")}


def test_sums_by_stream_and_by_place_lose_nothing(made):
    tcs, found, _ = made
    inside = np.arange(found.noise.shape[0]) < 2
    whole, part, rest = (side_sums(found, tokens, first=1) for tokens in (inside | True, inside, ~inside))
    assert [row.step for row in whole] == [1] * 4 + [2] * 4
    for name in ("features", "errors"):
        total = sum(float(np.asarray(group).sum()) for group in getattr(found, name))
        assert sum(getattr(row, name) for row in whole) == pytest.approx(total, rel=1e-9)
        for a, b, c in zip(whole, part, rest, strict=True):
            both = getattr(b, name) + getattr(c, name)
            twice = 2 if a.side == "txt" else 1  # text tokens count in both
            assert both == pytest.approx(twice * getattr(a, name), rel=1e-9)
    img = summed(found, IMAGE, tcs.sites.groups["img"], inside | True, 16)
    assert img.shape == (2, 2, 16) and img[1].sum() == pytest.approx(whole[4].features, rel=1e-9)
