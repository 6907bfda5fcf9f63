"""A run that is started again: when it is, how often, after what waits, and what it is told."""

import os
import signal
import sys
import threading

import pytest

from difffract_jax.cli import restarts

CHILD = """
import os, signal, sys, time
from pathlib import Path
place, *ends = sys.argv[1:]
number = len(list(Path(place).iterdir()))
(Path(place) / str(number)).write_text(os.environ["DIFFRACT_SUPERVISED"])
end = ends[number]
if end.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, end))
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (Path(place) / "waits").touch()
    time.sleep(60)
sys.exit(int(end))
"""


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """Supervises a child that ends, at each start, in the way of its number; returns status and what it was told."""
    monkeypatch.setattr(restarts, "PROGRAM", (sys.executable, "-S", "-E", "-c", CHILD))
    place = tmp_path / "starts"
    place.mkdir()

    def run(most, *ends):
        status = restarts.supervise(most, [str(place), *ends], first_wait=0.01)
        return status, [
            (place / str(n)).read_text() for n in range(len(list(place.iterdir()))) if (place / str(n)).exists()
        ]

    return run


@pytest.mark.parametrize(
    ("most", "ends", "status", "starts"),
    [
        (3, ("SIGKILL", "75", "SIGABRT", "0"), 0, 4),
        (3, ("SIGKILL", "1"), 1, 2),
        (0, ("0",), 0, 1),
        (1, ("75", "SIGKILL"), 1, 2),
        (5, ("2",), 2, 1),
    ],
)
def test_it_is_started_again_after_what_another_start_may_mend(supervise, capsys, most, ends, status, starts):
    assert supervise(most, *ends) == (status, [str(n) for n in range(starts)])
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("Note: the run ") for line in said].count(True) == starts - 1
    if status == 1 and starts > most:
        assert said[-1] == "Error: The run was killed by SIGKILL, and was restarted once already; see why, and go on."


def test_each_wait_is_twice_as_long(supervise, capsys):
    supervise(3, "SIGKILL", "75", "SIGKILL", "0")
    waits = [line.rpartition(" in ")[2] for line in capsys.readouterr().err.splitlines()]
    assert waits == ["0.01 s.", "0.02 s.", "0.04 s."]


def test_sigterm_is_handed_on_and_not_followed_by_a_restart(supervise, tmp_path):
    def terminate():
        while not (tmp_path / "starts" / "waits").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert supervise(3, "wait", "0") == (0, ["0"])
