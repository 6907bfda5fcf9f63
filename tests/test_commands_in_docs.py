"""Every command of the README and of docs/ is one that the command line takes; those that need no FLUX are run.

1. Each line that begins with `difffract`, fenced or indented, is parsed: its command, options and values exist.
2. A fenced block is run, in its page's order and in one directory a page, unless a comment before it says what it
   needs: `<!-- needs FLUX -->`, `<!-- needs a pod -->`, `<!-- needs libtpu -->`, or `<!-- test command -->`, which
   `.ci/run` runs. Only counts and times are made smaller: `SHORTER`.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from commands import run_command

from difffract_jax.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "difffract_jax/organism/weights/README.md"]
FENCED = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
MARKS = {"needs FLUX", "needs a pod", "needs libtpu", "test command"}
SHORTER = {
    r"--max-minutes \S+": "--max-minutes 0.01",
    r"train configs/smoke\.yaml": r"\g<0> --set steps=4 --set batch=32 --set buffer_rows=512 --set log_every=2",
    r"--steps 300 --batch 256": "--steps 4 --batch 32 --buffer-rows 512",
    r"--batch 256 --max-minutes": "--batch 32 --buffer-rows 512 --max-minutes",
    r"--steps 200 --batch 512": "--steps 10 --batch 64",
    r"steps=200, batch=512": "steps=10, batch=64",
    r"--set steps=200": "--set steps=4 --set batch=32 --set buffer_rows=512",
    r"--k 2,4,8,16": "--k 2 --prompts-count 4 --velocity-count 2 --images 1",
    r"--images 200": "--images 1",
    r"--prompts 256": "--prompts 2 --sites img/1",
    r"--max-nodes \d+": "--max-nodes 20",
    r"--step 0-3": "--step 0-3 --max-nodes 20",
    r"max_nodes=50, expansion_batch=10": "max_nodes=12, expansion_batch=6",
    r"--seeds 0\.\.4": "--seeds 0..1",
    r"--seeds 0\.\.9 --out steered": "--seeds 0..1 --out steered",
    r"difffract evaluate (?!--)": "difffract evaluate --prompts-count 4 --velocity-count 2 --scored 2 --images 1 ",
}
"""What is written otherwise for the test, in commands and in Python, so that a page takes seconds."""
BY_DEFAULT = {"difffract demo"}
"""Commands that a page shows and the default run runs whole: `test_journey.py`."""
ELSEWHERE = ("pip ", "hf ", "pytest", "HYPOTHESIS_PROFILE", "XLA_FLAGS", "python benchmarks/", "mkdocs ")
"""Commands that are not this package's."""


class Block(NamedTuple):
    """A fenced block: the page that it stands in, the comment before it, its language and its text."""

    page: str
    mark: str | None
    kind: str
    code: str


def blocks(path: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    name = str(path.relative_to(ROOT))
    found = FENCED.finditer(path.read_text(encoding="utf-8"))
    return [Block(name, match["mark"], match["kind"], match["code"]) for match in found]


def lines(code: str) -> list[str]:
    """Returns the commands of a block, those continued on the next line in one."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def words(line: str) -> list[str]:
    """Returns the arguments of a line, without the comment after it."""
    return [word for word in shlex.split(line, comments=True) if word != "..."]


def shorter(text: str) -> str:
    """Returns a command or Python with smaller counts."""
    for pattern, smaller in SHORTER.items():
        text = re.sub(pattern, smaller, text)
    return text


BLOCKS = [block for path in PAGES for block in blocks(path)]
COMMANDS = sorted(
    {
        (str(path.relative_to(ROOT)), line)
        for path in PAGES
        for line in lines(path.read_text(encoding="utf-8"))
        if line.startswith("difffract ") and (" -" in line or '"' in line)
    }
)
RUN = [name for name in dict.fromkeys(b.page for b in BLOCKS if b.kind in ("bash", "python") and b.mark not in MARKS)]


def test_every_mark_is_known_and_every_block_says_its_language() -> None:
    assert not [block for block in BLOCKS if block.mark is not None and block.mark not in MARKS]
    assert not [block for block in BLOCKS if not block.kind]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_in_a_page_is_one_that_there_is(page: str, line: str) -> None:
    command, arguments = typer.main.get_command(app), words(line)[1:]
    context = command.make_context("difffract", arguments)
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, arguments, parent=context)
    assert context.command_path.startswith(f"difffract {words(line)[1]}") and context.params


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_what_a_page_shows_runs_as_it_stands(page, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in BLOCKS:
        if block.page != page or block.mark in MARKS:
            continue
        if block.kind == "python":
            exec(compile(shorter(block.code), page, "exec"), {})
            ran += 1
        for line in lines(block.code) if block.kind == "bash" else ():
            if line.startswith(ELSEWHERE) or line.startswith("#") or line in BY_DEFAULT:
                continue
            line = shorter(line)
            name, *arguments = words(line)
            assert name == "difffract", line
            result = run_command(monkeypatch, capsys, *arguments)
            assert result.status == 0, f"{line}: {result.err}"
            ran += 1
    assert ran or page == "docs/testing.md"
