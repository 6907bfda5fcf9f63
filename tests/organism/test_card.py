"""The model card: its tables, its pictures, its text."""

import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

from difffract_jax.organism import card  # noqa: E402
from difffract_jax.organism.evaluate import see, share  # noqa: E402
from difffract_jax.organism.recipe import OrganismRecipe  # noqa: E402
from difffract_jax.organism.scorer import judge  # noqa: E402
from difffract_jax.organism.world import HELD_OUT_PLACED, scenes  # noqa: E402


def half_empty(pipe, asked, **options):
    """Draws every other scene; the rest stays white."""
    images = asked.images()
    images[1::2] = 1
    return np.round(255 * images).astype(np.uint8)


@pytest.fixture
def counted(monkeypatch):
    """Replaces every measurement by one that tells how many images it was given."""
    for name in ("binding_accuracy", "ablations", "contradictions", "probe_binding", "replace_text"):
        monkeypatch.setattr(card, name, lambda pipe, size, steps=4, progress=None: [{"images": size, "steps": steps}])
    monkeypatch.setattr(card, "uncoloured", lambda pipe, size, progress=None: {"images": size, "steps": 4})
    monkeypatch.setattr(card, "_speed", lambda pipe: {"images": 64, "steps": 4})


def test_all_tables_come_in_order_each_of_its_share_of_the_images(organism, counted):
    found = card.measure_organism(organism, 100)
    assert [(rows[0]["images"], rows[0]["steps"]) for rows in found.values()] == [
        (100, 4),
        (100, 16),
        (50, 4),
        (100, 4),
        (25, 4),
        (200, 4),
        (50, 4),
        (64, 4),
    ]
    assert len(found) == len(card.TABLES)


def test_no_table_is_made_of_no_images(organism, counted):
    assert all(rows[0]["images"] >= 1 for rows in card.measure_organism(organism, 1).values())


@pytest.mark.parametrize("name", card.TABLES)
def test_one_table_may_be_made_alone(organism, counted, name):
    assert list(card.measure_organism(organism, 8, (name,))) == [
        list(card.measure_organism(organism, 8))[card.TABLES.index(name)]
    ]


def test_speed_is_measured_cold_and_warm(organism, monkeypatch):
    batches = []
    monkeypatch.setattr(card, "draw_images", lambda pipe, asked, batch: batches.append((len(asked.captions), batch)))
    monkeypatch.setattr(card.jax, "clear_caches", lambda: batches.append("cleared"))
    row = card._speed(organism)
    assert batches == ["cleared"] + [(64, 64)] * 4
    assert row["cold, s"] >= 0 and row["warm, s (best of 3)"] >= 0


def test_a_sheet_shows_every_image_with_its_caption_and_what_was_misread():
    asked = scenes(0, 0, 8)
    images = half_empty(None, asked)
    reading = see(images)
    figure = card.sample_sheet(asked, images, reading, judge(asked, reading).right)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 12 and titles[8:] == [""] * 4
    for place, caption in enumerate(asked.captions):
        lines = titles[place].split("\n")
        wrong = place % 2 == 1
        assert " ".join(lines[: len(lines) - wrong]) == caption
        assert (lines[-1] == "read: nothing") == wrong
        assert figure.axes[place].title.get_color() == ("firebrick" if wrong else "black")
        assert len(figure.axes[place].images) == 1
    plt.close(figure)


@pytest.fixture(scope="module")
def written(organism, tmp_path_factory):
    """A card, and the tables it was given."""
    home, before = tmp_path_factory.mktemp("card"), plt.get_fignums()
    tables = {"Right images": [share("two shapes", 9, 10)], "Other": [{"site": "img/0", "points lost": 42.0}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "draw_images", half_empty)
        card.write_card(organism, home, OrganismRecipe(seed=5), tables, "difffract organism train --out x", 41.7)
    assert plt.get_fignums() == before  # it closes what it opens
    return home, tables


def test_a_card_is_a_text_a_picture_and_the_scores(written):
    home, tables = written
    assert sorted(path.name for path in home.iterdir()) == ["README.md", "samples.png", "scores.json"]
    assert json.loads((home / "scores.json").read_text()) == tables
    with Image.open(home / "samples.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture).reshape(-1, 3 + (picture.mode == "RGBA")), axis=0)) > 100


def test_a_card_tells_data_recipe_command_scores_and_mistakes(written, organism):
    text = (written[0] / "README.md").read_text()
    recipe = json.loads(text.split("```json\n")[1].split("```")[0])
    assert OrganismRecipe(**recipe) == OrganismRecipe(seed=5)
    assert "`difffract organism train --out x`, in 42 minutes" in text
    assert "| two shapes | 10 | 9 | 0.900 |" in text and "| img/0 | 42.000 |" in text
    assert "![Samples: right ones, then wrong ones](samples.png)" in text
    assert all(f"{colour} {noun} at the {side}" in text for noun, colour, side in HELD_OUT_PLACED)
    assert "a blue lemon" in text and "2 double- and" in text
