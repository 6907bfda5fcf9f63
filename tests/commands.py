"""The command line, run in this process, as the tests of all commands need it."""

import json
import sys
from typing import NamedTuple

from difffract_jax.cli import main as cli


class Run(NamedTuple):
    """How one command line ended."""

    status: int
    out: str
    err: str


def run_command(monkeypatch, capsys, *arguments) -> Run:
    """Runs `difffract ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["difffract", *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    return Run(status, *capsys.readouterr())


def run_json(monkeypatch, capsys, *arguments) -> tuple[int, object, str]:
    """Runs `difffract ARGUMENTS --json`; returns status, the result (what was printed, if it failed), and stderr."""
    run = run_command(monkeypatch, capsys, *arguments, "--json")
    return run.status, json.loads(run.out) if run.status == 0 else run.out, run.err


def done(result):
    """Returns the result of a command that must succeed."""
    status, found, err = result
    assert status == 0, err
    return found
