"""A process of pytest-xdist that ends in the middle of a test fails that test alone, and the run comes to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import scheduling

def pytest_xdist_make_scheduler(config, log):
    return scheduling.Together(config, log, {"test_d.py": "test_c.py"})
"""
TEST = """
import os

def test_before():
    pass

def test_ends():
    if CRASHES:
        os._exit(1)

def test_after():
    pass
"""


@pytest.mark.parametrize("crashing", ["ab", "abcde"])
def test_a_run_goes_on_after_a_crash(tmp_path, crashing):
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    for name in "abcde":
        test = TEST.replace("CRASHES", str(name in crashing))
        (tmp_path / f"test_{name}.py").write_text(test, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n2", "--dist=loadfile", "-p", "no:cacheprovider", "-q", "."]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command[3:3] = ["-p", "xdist"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert f"{len(crashing)} failed, {15 - len(crashing)} passed" in run.stdout, run.stdout
    for name in crashing:
        assert f"crashed while running 'test_{name}.py::test_ends'" in run.stdout
