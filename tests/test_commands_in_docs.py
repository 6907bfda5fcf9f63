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
    r"--max-minutes \S+": "--max-minutes 0.05",
    r"--steps 300": "--steps 20",
    r"steps=200": "steps=4",
    r"--k 2,4,8,16": "--k 2,4",
    r"--images 200": "--images 8",
    r"--prompts 256": "--prompts 8",
    r"difffract evaluate (?!--)": "difffract evaluate --prompts-count 16 --velocity-count 4 --scored 16 ",
}
"""What is written otherwise for the test, so that it takes a minute a page."""
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
            exec(compile(block.code, page, "exec"), {})
            ran += 1
        for line in lines(block.code) if block.kind == "bash" else ():
            if line.startswith(ELSEWHERE) or line.startswith("#"):
                continue
            for pattern, smaller in SHORTER.items():
                line = re.sub(pattern, smaller, line)
            name, *arguments = words(line)
            assert name == "difffract", line
            result = run_command(monkeypatch, capsys, *arguments)
            assert result.status == 0, f"{line}: {result.err}"
            ran += 1
    assert ran or page == "docs/testing.md"
