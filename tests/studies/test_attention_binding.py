"""Binding with attention in the circuit: what is kept of scenes, and the figure."""

import numpy as np
import pytest

from difffract_jax import random_pipeline, random_transcoders
from difffract_jax.config import UserError
from difffract_jax.studies.attention_binding import COUNTS, ROUNDS, WAYS, draw_shares
from difffract_jax.studies.cases import Case, Material
from difffract_jax.studies.outcomes import Outcomes
from difffract_jax.studies.scene_effects import scene_scores


def outcomes(share: float) -> Outcomes:
    """Eight scenes, a share of which have their colours exchanged."""
    success = np.arange(8) < 8 * share
    return Outcomes(**{name: success if name == "success" else np.zeros(8) for name in Outcomes._fields})


@pytest.mark.parametrize("number", sorted(ROUNDS))
def test_the_legend_lies_beside_the_lines(number):
    ceilings = ROUNDS[number].ceilings
    at = {(way, count): (1.0, outcomes(0.5)) for way in WAYS for count in COUNTS}
    figure = draw_shares(at | {(way, 0): (1.0, outcomes(0.75)) for way in ceilings}, ceilings)
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    told = [text.get_text() for text in legend.get_texts()]
    assert told == [*(f"{way}: 75%" for way in ceilings), "bar, 60%", *WAYS]


def test_scores_that_are_kept_are_taken_and_a_damaged_file_is_named(tmp_path):
    pipe = random_pipeline()._replace(source="m" * 40)
    tcs = random_transcoders(pipe.config.transformer)._replace(source="t" * 40)
    scenes = Material(**dict.fromkeys(Material._fields))._replace(cases=[Case("a red circle", "a blue circle", 3, 0)])
    given = pipe, tcs, (scenes, scenes), 0, ((), ())
    path = tmp_path / f"{'m' * 12}-{'t' * 12}-3.npz"
    np.savez(path, prompt="a red circle", mean=np.ones((2, 2, 3), "f4"), token=np.zeros((2, 2, 3), "f4"))
    scores = scene_scores(*given, tmp_path)
    assert scores.mean.sum() == 12 and scores.token.sum() == 0
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-40], b"PK" + whole[2:60]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name}.* is damaged; delete it"):
            scene_scores(*given, tmp_path)
