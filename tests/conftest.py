"""What every test runs under.

1. The CPU, pretending to be eight devices, so that sharding is tested without an accelerator.
2. No network: a library that would fetch something fails at once.
3. Matrix products at full float32 precision, which is what the tolerances assume.
4. Compiled programs are dropped before they use up the memory maps that the kernel grants a process.
5. What one process has compiled others read, in this run and the next: `compiled.py`. Programs of several devices are
   compiled anew, since loaded ones may hang: `compile_cpu_meshes_anew`.
6. The compiler does not optimise its machine code, since compiling is two thirds of the time; a module that mostly
   compiles takes a third of the time. Results differ by rounding alone, which no tolerance may hang on. As users run
   it: `XLA_FLAGS= pytest`. A virtual device waits ten minutes for the others, since on a busy machine the 40 seconds
   after which XLA ends the process may pass.
7. Hypothesis draws the same examples every time, so that a run's outcome hangs on the code alone; to search further:
   `HYPOTHESIS_PROFILE=search pytest`.
8. The files that take longest come first, so that the two processes end together; garbage is collected less often.
9. Files that set up the same things are run by one process, one after the other: `TOGETHER`.
10. Byte code of the package and the tests is kept in `__pycache__`, also where PYTHONDONTWRITEBYTECODE is set: without
    it every process of a run, and every command that tests start, would compile all files again.
11. Programs share the compiler's contexts, which cost more to make than most programs: `contexts.py`.
12. Annotations are checked at a fraction of what jaxtyping's own import hook takes for it: `typechecks.py`.
13. The `x64` fixture: float64 and strict dtype promotion for the laws that hold exactly in real arithmetic.
"""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compiled

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # XLA ends a process that is given a flag which it does not know.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith(("0.10.", "0.11.0")) else ""),
)
compiled.share()

import typechecks  # noqa: E402  (the environment above must be set first)

typechecks.share()

import contexts  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import processor_times  # noqa: E402
import pytest  # noqa: E402
from hypothesis.internal.conjecture import providers  # noqa: E402

import hub_server  # noqa: E402
from difffract_jax.storage.compile_cache import compile_cpu_meshes_anew  # noqa: E402

contexts.share()
compile_cpu_meshes_anew()

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
if os.environ.get("HYPOTHESIS_PROFILE", "same") == "same" and hasattr(providers, "is_local_module_file"):
    # Else the numbers in the source of every module that is loaded become examples: they are read for five seconds in
    # each process, and examples change with any of them.
    providers.is_local_module_file = lambda path: False

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


MAPS = Path("/proc/self/maps")
MOST_MAPS = 45_000
"""Of the 65,530 that Linux grants; every compiled program holds some, and without one the compiler crashes."""


TOGETHER = (
    ("organism/test_train.py", "organism/test_pool.py", "organism/test_flow.py", "organism/test_images.py")
    + ("organism/test_text.py",),
    ("circuits/attribution/test_pullback.py", "circuits/attribution/test_attribute.py")
    + ("circuits/frozen/test_replacement.py", "circuits/checks/test_faithfulness.py"),
    ("circuits/effects/test_attention.py", "circuits/effects/test_heads.py")
    + ("circuits/attribution/test_score_laws.py", "circuits/attribution/test_explained.py")
    + ("circuits/attribution/test_pooled_laws.py", "circuits/attribution/test_pooled_graph.py"),
    ("dashboards/test_feature_scan.py", "dashboards/test_feature_pages.py", "dashboards/test_feature_links.py"),
    ("circuits/checks/test_validation.py", "circuits/effects/test_readings.py"),
    ("cli/test_explain.py", "cli/test_validate.py", "test_journey.py", "studies/test_circuit_studies.py"),
    ("transcoders/test_processes.py", "transcoders/test_training.py", "transcoders/test_deadlines.py"),
)
"""Files that share a trace, a scan, compiled steps or a server of processes, which are made once in a process."""
LONGEST = (
    *("test_notebooks.py", "transcoders/test_processes.py", "cli/test_explain.py"),
    *("circuits/attribution/test_pullback.py", "organism/test_train.py", "circuits/test_streamed.py"),
    *("circuits/attribution/test_placement.py", "circuits/attribution/test_engine.py", "transcoders/test_step.py"),
    *("circuits/effects/test_attention.py", "transcoders/test_commands.py", "circuits/checks/test_validation.py"),
    *("transcoders/test_active.py", "circuits/test_ways.py", "circuits/trace/test_imported.py", "models/test_mmdit.py"),
)
"""Files in the order in which they start, all others after them as they are found; the last ones are to be short."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--processor-times`, which costs nothing where it is not given."""
    parser.addoption("--processor-times", type=Path, metavar="FOLDER", help="write each test's processor seconds there")


def pytest_configure(config: pytest.Config) -> None:
    """Measures what each test costs, if that is asked for: `processor_times.py`."""
    if (folder := config.getoption("--processor-times")) is not None:
        config.pluginmanager.register(processor_times.ProcessorTimes(folder.absolute()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first; pytest-xdist hands files out in this order."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out files as `--dist=loadfile` does, but those of `TOGETHER` as one; see `scheduling.py`."""
    if config.getoption("dist") != "loadfile":
        return None
    from scheduling import Together

    first = {f"tests/{name}": f"tests/{names[0]}" for names in TOGETHER for name in names}
    return Together(config, log, first)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what was imported, which stays, and lets it look less often: tracing makes much."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets compiled programs after a module if there are too many; those that come back are compiled again.

    The organism's tests share theirs for the session and count their compilations, so nothing is forgotten among them.
    """
    yield
    if request.path.parent.name != "organism" and MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    """A stand-in for the Hugging Face Hub, empty, to which the client of this process is pointed."""
    with hub_server.stand_in(monkeypatch, tmp_path / "hub-cache") as server:
        yield server


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in float64 with strict dtype promotion; both belong to jit's cache key, so nothing leaks out."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
