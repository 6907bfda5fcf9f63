"""What documentation cites exists: files of docs/, sections of the method, and every public name in the API's pages."""

import re
from pathlib import Path

import yaml

import difffract_jax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CODE = ("difffract_jax", "converters", "tests", "benchmarks", "examples")
SOURCES = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NAMED = re.compile(r"docs/([\w-]+\.md)")
LINKED = re.compile(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)")
NUMBERS = r"sections? (\d+(?:(?:, and |, | and | to )\d+)*)"
CITED = re.compile(rf"docs/method\.md, {NUMBERS}|{NUMBERS} of (?:\[the method\]\(method\.md\)|docs/method\.md)")
SECTIONS = {int(number) for number in re.findall(r"^## (\d+)\. ", (DOCS / "method.md").read_text(), re.MULTILINE)}


def sections_in(text: str) -> list[int]:
    """Returns the sections of the method that a text cites; `4 to 6` is three of them."""
    numbers_cited = []
    for match in CITED.finditer(" ".join(text.split())):
        numbers = match[1] or match[2]
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers):
            numbers_cited += range(int(first), int(last or first) + 1)
    return numbers_cited


def test_what_is_cited_exists() -> None:
    absent = []
    for path in (*SOURCES, *PAGES):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        absent += [f"{name} cites docs/{page}" for page in NAMED.findall(text) if not (DOCS / page).is_file()]
        absent += [f"{name} cites section {number}" for number in sections_in(text) if number not in SECTIONS]
    assert not absent


def test_links_between_pages_lead_somewhere() -> None:
    links = [(path, target) for path in PAGES for target in LINKED.findall(path.read_text(encoding="utf-8"))]
    assert len(links) > 20  # else they are no longer recognised
    assert not [f"{path.name}: {target}" for path, target in links if not (path.parent / target).is_file()]


def test_the_method_has_the_sections_that_code_cites() -> None:
    assert set(range(1, 13)) == SECTIONS
    cited = {number for path in SOURCES for number in sections_in(path.read_text(encoding="utf-8"))}
    assert {4, 5, 6, 7, 9, 10} <= cited  # else the citations are no longer recognised


def test_citations_are_read_as_they_are_written() -> None:
    text = "(docs/method.md, section 3), docs/method.md,\nsections 4 to 6; docs/method.md, sections 7 and 9"
    assert sections_in(text) == [3, 4, 5, 6, 7, 9]
    assert sections_in("section 7 of [the method](method.md) and section 2 of another page") == [7]


def _is_namespace(name: str) -> bool:
    return name == "__version__" or difffract_jax._HOME[name] == f"difffract_jax.{name}"


def test_the_api_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    homes = {f"{difffract_jax._HOME[name]}.{name}" for name in difffract_jax.__all__ if not _is_namespace(name)}
    homes = {name.replace("circuits.editing.interventions.Edit", "circuits.notation.edits.Edit") for name in homes}
    assert homes <= shown, "add these to docs/api.md"
    files = {name: ROOT / name.replace(".", "/") for name in shown}
    # A name in a module, or a package.
    absent = [name for name, path in files.items() if not (path.parent.with_suffix(".py").is_file() or path.is_dir())]
    assert not absent


def test_every_page_stands_in_the_navigation() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {page for entry in entries for page in entry.values()} == {path.name for path in DOCS.glob("*.md")}
