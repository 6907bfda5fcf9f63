"""Commands that run out of memory end in one sentence: what was done, what was asked for, what there is, what helps."""

import ast
import errno
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import pytest
from commands import Run, run_command

from difffract_jax.cli import failures
from difffract_jax.cli.main import _options_of
from difffract_jax.memory import host_memory, text_of_bytes

PACKAGE = Path(failures.__file__).parents[1]
GENERATE = ("generate", "m", "p")


@pytest.fixture
def difffract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Run]:
    """Runs `difffract ARGUMENTS` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return partial(run_command, monkeypatch, capsys)


def raising(error: BaseException) -> Callable[..., None]:
    def load(*names: object, **options: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError("Unable to allocate 74.5 GiB for an array with shape (9,)"), "asked for 74.5 GiB more"),
        (MemoryError(), "needs more than there is"),
        (MemoryError("std::bad_alloc"), "needs more than there is"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "needs more than there is"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."), "asked for 4.0 TiB more"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 3.00GiB (3221225472B)"),
            "asked for 3.0 GiB more",
        ),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: Out of memory while trying to allocate 8589934592 bytes.\nBy the way"
            ),
            "asked for 8.0 GiB more",
        ),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 104.60G of 95.74G hbm. Exceeded"
            ),
            "asked for 104.6 GiB more",
        ),
    ],
)
def test_too_little_memory_is_one_sentence(
    error: Exception, asked: str, difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difffract_jax.loading.load_pipeline", raising(error))
    run = difffract(*GENERATE)
    assert run.status == 1 and run.out == ""
    assert run.err.startswith("Error: There is not enough memory: ") and run.err.count("\n") == 1
    there = text_of_bytes(host_memory().total)
    assert asked in run.err and re.search(rf"(has|allows) {re.escape(there)}; what takes less: ", run.err)
    assert "--dtype bf16" in run.err and "--height" in run.err and "difffract plan" in run.err


def test_it_says_what_was_being_done(difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    # `load_pipeline` is the package's own; what fails lies below it.
    monkeypatch.setattr("difffract_jax.parts.load_tree", raising(MemoryError("std::bad_alloc")))
    monkeypatch.setattr("difffract_jax.loading.convert_pipeline", raising(MemoryError("std::bad_alloc")))
    run = difffract("generate", "organism", "a red circle")
    assert "not enough memory: loading the model needs more than there is" in run.err


def test_what_was_given_already_is_not_advised(difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difffract_jax.loading.load_pipeline", raising(MemoryError()))
    assert "--dtype" not in difffract(*GENERATE, "--dtype", "bf16").err


def test_debug_shows_the_traceback_of_this_too(difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difffract_jax.loading.load_pipeline", raising(MemoryError("std::bad_alloc")))
    with pytest.raises(MemoryError):
        difffract(*GENERATE, "--debug")


def test_an_error_that_is_a_mistake_of_ours_is_shown_whole(
    difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difffract_jax.loading.load_pipeline", raising(RuntimeError("INTERNAL: a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        difffract(*GENERATE)


def test_every_function_that_is_named_is_there() -> None:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
    defined = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert failures.DOING.keys() <= defined


@pytest.mark.parametrize("command", [("trace",), ("steer",), ("train",), ("convert", "flux"), ("generate",)])
def test_commands_name_options_of_theirs_alone(command: tuple[str, ...]) -> None:
    options = _options_of(command)
    told = set(re.findall(r"--([a-z-]+)", failures.advice(options)))
    assert told and {name.replace("-", "_") for name in told} <= {*options}


def test_a_real_cap_ends_in_the_sentence(tmp_path: Path) -> None:
    # 600 MB beyond what JAX itself has taken: programs compile, and one array of the image's is larger.
    code = """
import resource, jax
from difffract_jax.cli.main import main
jax.devices()
with open("/proc/self/status", encoding="utf-8") as status:
    taken = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken + 600 * 10**6,) * 2)
main()
"""
    size = ("--height", "4096", "--width", "4096", "--out", str(tmp_path / "image.png"))
    line = [sys.executable, "-c", code, "generate", "organism", "a red circle", *size]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith("Error: There is not enough memory: ") and run.stderr.count("\n") == 1
    assert "denoising asked for 840.3 MiB more, and ulimit -d allows" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_thread_that_is_terminated_ends_in_the_sentence_too() -> None:
    code = """
import ctypes
from difffract_jax.cli.failures import told_when_terminated
library = ctypes.CDLL("libstdc++.so.6")
with told_when_terminated(("dtype",), ()):
    library._ZSt17__throw_bad_allocv()  # ctypes catches nothing: C++ finds no handler
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: There is not enough memory: XLA needs more") and run.stderr.count("\n") == 1


def test_another_termination_stays_what_it_was() -> None:
    code = """
import ctypes
from difffract_jax.cli.failures import told_when_terminated
library = ctypes.CDLL("libstdc++.so.6")
with told_when_terminated((), ()):
    library._ZSt20__throw_length_errorPKc(b"too long")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -6 and "std::length_error" in run.stderr and "not enough memory" not in run.stderr
