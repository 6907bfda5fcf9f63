"""The transcoders and SAEs that ship with the organism: whole, small, and as faithful as their reports say."""

import numpy as np
import pytest

from difffract_jax.directories import SHIPPED
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.organism.scored import accuracies
from difffract_jax.organism.world import scenes
from difffract_jax.transcoders.evaluation import evaluate
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from difffract_jax.transcoders.transcoder import check_fit


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("organism")


@pytest.mark.parametrize(("name", "role"), [("organism", "transcoder"), ("organism-saes", "sae")])
def test_there_is_one_for_every_mlp(pipe, name, role):
    tcs = load_transcoders(name)
    check_fit(tcs, pipe.config.transformer)
    assert tcs.sites.groups == dict.fromkeys(("img", "txt", "joint"), (0, 1))
    assert tcs.config.role == role


def test_both_sets_take_under_twenty_megabytes_together():
    files = [path for home in SHIPPED.values() for path in home.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20 * 10**6


def test_all_mlps_can_be_replaced_at_once(pipe, tmp_path):
    """On a few captions of a world of its own; the report measures many."""
    settings = TrainConfig(model="organism", prompts="world", out=tmp_path, prompts_at_once=8, validation_share=0.2)
    small = EvaluateConfig(run=tmp_path, prompts_count=8, velocity_count=8, images=0, scored=0)
    tcs = load_transcoders("organism")
    result = evaluate(small, settings, pipe, tcs, caption=caption)
    width = pipe.config.transformer.d_model
    assert np.mean([row["l0"] for row in result.sites]) <= width / 4
    assert min(row["recovered"] for row in result.velocity) >= 0.95


def caption(number):
    return scenes(60_000, number // 8, 8).captions[number % 8]


@pytest.mark.slow
def test_images_stay_right_with_all_mlps_replaced(pipe):
    rows = {row["what"]: row["right"] for row in accuracies(pipe, load_transcoders("organism"), 64)}
    assert rows["all MLPs replaced"] >= rows["model"] - 2  # three points
