"""What the tests of commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import done, run_json


@pytest.fixture
def difffract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Callable[..., dict[str, Any]]:
    """Runs `difffract ARGUMENTS --json` in a module's `folder`, and returns what it printed."""
    monkeypatch.chdir(folder)
    return lambda *arguments: done(run_json(monkeypatch, capsys, *arguments))
