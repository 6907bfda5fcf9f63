"""What a run gets that nobody set: it follows from the rows, and never overrides what was set."""

import pytest

from difffract_jax.transcoders.defaults import RESUMED, choose, shown
from difffract_jax.transcoders.settings import TrainConfig


@pytest.mark.parametrize(
    ("width", "k", "lr"), [(3072, 32, 1.2e-4), (64, 16, 8e-4), ((1024, 32), 8, 2e-4), (2, 1, 4.5e-3)]
)
def test_sparsity_and_rate_follow_from_the_width(width, k, lr):
    made, why = choose(TrainConfig(model="m", prompts="p"), width, timed=True)
    assert (made.k, made.lr, made.target_l0, made.tokens_per_step) == (k, lr, k, 64)
    assert why["k"].startswith("default for a width of ") and made.conditioning == "film"


def test_a_large_model_is_read_in_bfloat16_unless_it_was_said_how():
    made, why = choose(TrainConfig(model="m", prompts="p"), 64, timed=True, large=True)
    assert (made.model_dtype, why["model_dtype"]) == ("bf16", "default for a large model")
    assert choose(TrainConfig(model="m", model_dtype="f32"), 64, timed=True, large=True)[0].model_dtype == "f32"


def test_what_was_set_stays():
    given = {"model": "m", "prompts": "p", "k": 5, "lr": 0.1, "target_l0": 3.0, "tokens_per_step": None}
    made, why = choose(TrainConfig(**given), 64, timed=True)
    assert made == TrainConfig(**given) and not why


def test_rows_without_times_get_no_conditioning_unless_it_was_asked_for():
    made, why = choose(TrainConfig(rows="rows"), (8, 4), timed=False)
    assert (made.conditioning, made.time_embed, why["time_embed"]) == ("none", 0, "rows have no t")
    assert made.tokens_per_step is None
    assert choose(TrainConfig(rows="rows", time_embed=8), (8, 4), timed=False)[0].conditioning == "film"


def test_the_table_says_where_every_value_came_from():
    made, why = choose(TrainConfig(model="organism", batch=7, steps=3, seed=5), 64, timed=True)
    rows = {row["setting"]: row for row in shown(made, 64, why | {"batch": "--batch", "seed": "run.yaml"})}
    assert rows["expansion"] == {"setting": "expansion", "value": "16.0 (1024 features)", "from": "default"}
    assert rows["prompts"] == {"setting": "prompts", "value": "world", "from": "default"}
    assert (rows["batch"]["from"], rows["seed"]["from"]) == ("--batch", "run.yaml")
    assert not {"target_l0", "l1", "out"} & rows.keys(), "what this activation does not read is not shown"
    assert rows["k"] == {"setting": "k", "value": "16", "from": "default for a width of 64"}


def test_the_table_of_a_resumed_run_names_the_usual_settings_and_what_the_line_changed():
    made = TrainConfig(model="organism")
    begun = shown(made, 64, {})
    resumed = shown(made, 64, dict.fromkeys(TrainConfig.model_fields, RESUMED) | {"keep": "--keep"})
    assert [row["setting"] for row in resumed] == [*(row["setting"] for row in begun), "keep"]
    assert {row["from"] for row in resumed} == {RESUMED, "--keep"}
    assert {row["setting"]: row["value"] for row in begun}["tokens_per_step"] == "-"
