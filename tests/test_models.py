"""The tables of every model: docs/models.md has them whole, and what makes them measures what it says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from model_kinds import KINDS
from tolerances import TOL

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
KEPT = ROOT / "docs" / "figures" / "models.json"
FIGURES = {"grey levels", "latents", "latents, bf16", "velocity", "velocity, bf16", "rows", "loss", "change"}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("models_benchmark", ROOT / "benchmarks" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables(text):
    """Every table of a page: rows of cells, the names of the columns first."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in b.strip().splitlines()] for b in blocks]


def test_every_model_has_a_row_in_every_table_and_no_cell_is_empty(benchmark):
    text = PAGE.read_text(encoding="utf-8")
    written = text.partition("<!-- tables -->\n")[2].partition("\n<!-- end of tables -->")[0]
    left = re.findall(r"[\w.-]+\w", (re.findall(r"^Not measured: (.+)$", written, re.MULTILINE) or [""])[0])
    measured, kept = [name for name in KINDS if name not in left], json.loads(KEPT.read_text(encoding="utf-8"))
    assert set(left) <= set(KINDS) and measured
    assert benchmark.tables([kept[name] for name in measured]) in written, "the page has the figures that are kept"
    found = tables(written)
    assert len(found) == 3
    for names, _, *rows in found:
        assert [row[0] for row in rows] == measured
        assert all(len(row) == len(names) and all(row) for row in rows)
    assert "DIFFERS" not in text and "NOT FINITE" not in text
    for _, _, *rows in tables(text):
        assert all(all(row) for row in rows), "no cell of the page is empty"


def made_up(benchmark, name):
    """A row of figures that nothing measured."""
    row = benchmark.converted(KINDS[name], name) | benchmark.at_rest(name)
    exact = {f"conservation, {steps} step{'s' * (steps == 'all')}, {t}" for steps in ("one", "all") for t in TYPES}
    keys = FIGURES | exact | {f"intervention, {t}" for t in TYPES} | {f"{n}, diffusers' bf16" for n in LOSSY}
    counts = {"steps": 4, "branches": 2, "traced steps": 4, "traced evaluations": 8, "finite": True}
    return {"model": name} | row | dict.fromkeys(keys, 0.5) | counts


TYPES, LOSSY = ("float32", "float64"), ("latents", "velocity")


def test_tables_are_written_between_the_marks_of_a_page(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "GIGABYTES", (8, 80))
    row = made_up(benchmark, "sd3.5-medium") | benchmark.smallest_devices("sd3.5-medium")
    assert (row["tensors"], row["covered"], row["preset"]) == (909, True, True)
    assert row["bytes of the transformer"] == 2 * row["numbers"] < row["bytes"]
    assert (row["trace, resident"], row["generate, streamed"]) == ("80GB", "8GB")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    benchmark.write_page(page, benchmark.tables([row]))
    text = page.read_text()
    assert text.startswith("before\n<!-- tables -->\n| model |") and text.endswith("|\n<!-- end of tables -->\nafter\n")
    assert all(len(cells) == len(names) and all(cells) for names, _, cells in tables(text))
    page.write_text("none")
    with pytest.raises(SystemExit, match="lacks the marks <!-- tables -->"):
        benchmark.write_page(page, "")


def test_figures_that_are_kept_are_not_measured_again(benchmark, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(benchmark, "measure", lambda name, say: measured.append(name) or {"model": name})
    for names in (["flux-dev"], ["flux-dev", "sd3-medium"]):
        rows = benchmark.measure_all(names, tmp_path / "kept.json", print)
    assert measured == ["flux-dev", "sd3-medium"] and [row["model"] for row in rows] == measured


@pytest.mark.slow
def test_what_holds_for_a_model_holds(benchmark, monkeypatch):
    """The model with all that others lack: three kinds of blocks, two branches, three text encoders."""
    monkeypatch.setattr(benchmark, "smallest_devices", lambda name: {})
    row = benchmark.measure("sd3.5-medium", steps=2)
    assert row["covered"] and row["preset"] and row["finite"]
    assert row["grey levels"] <= 1 and max(row["latents"], row["velocity"]) <= TOL.f32_run
    assert row["velocity, bf16"] <= max(TOL.bf16, row["velocity, diffusers' bf16"])
    # Guidance multiplies the rounding of both evaluations, ours and diffusers' alike: one draw of it beside another.
    assert row["latents, bf16"] <= 2 * row["latents, diffusers' bf16"]
    assert (row["traced steps"], row["traced evaluations"]) == (2, 4)
    assert row["conservation, one step, float32"] <= TOL.conservation_f32
    assert row["conservation, all steps, float32"] <= TOL.conservation_steps_f32
    assert row["intervention, float32"] <= TOL.conservation_steps_f32
    exact = [row[key] for key in row if key.endswith("float64")]
    assert len(exact) == 3 and max(exact) <= TOL.conservation_x64
    assert row["rows"] <= TOL.f32_run and max(row["loss"], row["change"]) <= TOL.f32_run
