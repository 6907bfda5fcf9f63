"""circuit-tracer's own viewer for tests: its page and its server from its package, its libraries from npm.

1. The package is the folder that CIRCUIT_TRACER names, or the wheel of PyPI at `VERSION`, downloaded without what it
   depends on: of it, the page's files and the module of its server are used, which needs the standard library alone.
   PyPI's wheel is published by a fork of decoderesearch/circuit-tracer; the page in it is that project's.
2. The page loads scripts from the web. `data/viewer_libraries` pins the same libraries at npm; the browser is handed
   these in their place, and every other request beyond the page's server is refused and noted.
3. Both are kept in the user's cache, beside the compiled programs.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = "0.5.0"
NEEDED = "The test of circuit-tracer's viewer needs"
LOCK = Path(__file__).parent / "data" / "viewer_libraries"
LIBRARIES = {
    "d3.js": ("d3/dist/d3.min.js",),
    "jetpack": ("d3-collection/dist/d3-collection.min.js", "d3-jetpack/build/d3-jetpack.cjs"),
    "dagre": ("dagre/dist/dagre.min.js",),
    "pako": ("pako/dist/pako.min.js",),
    "npy": (),
    "hotserver": (),
}
"""Parts of the addresses that the page loads scripts from, and what stands in for each; nothing for what is unused."""
DRAWS_AXES = """
(() => {
  const plain = d3.conventions;
  d3.conventions = (how) => {
    const made = plain(how);
    made.drawAxis = (svg) => d3.drawAxis({ ...made, svg: svg ?? made.svg });
    return made;
  };
})();
"""
"""What the page expects of d3-jetpack beyond npm's: conventions that draw their axes themselves."""


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "difffract-viewers"


def _ran(command: list[str], what: str, folder: Path | None = None) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, f"{NEEDED} {what}: `{' '.join(command)}` says {run.stderr or run.stdout}"


def package() -> Path:
    """Returns the folder of circuit-tracer's package, `circuit_tracer`, downloaded if need be."""
    named = os.environ.get("CIRCUIT_TRACER")
    if named:
        assert (Path(named) / "frontend" / "assets").is_dir(), f"CIRCUIT_TRACER={named} holds no frontend/assets"
        return Path(named)
    folder = _cache() / f"circuit-tracer-{VERSION}"
    if not (folder / "circuit_tracer").is_dir():
        wheels = folder.with_name(f"{folder.name}-{os.getpid()}")
        wanted = [f"circuit-tracer=={VERSION}", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
        run = subprocess.run([sys.executable, "-m", "pip", "download", *wanted], capture_output=True, text=True)
        assert run.returncode == 0, (
            f"{NEEDED} its wheel: pip download {wanted[0]} failed, or name its folder in CIRCUIT_TRACER. {run.stderr}"
        )
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                wheels, [name for name in archive.namelist() if name.startswith("circuit_tracer/frontend/")]
            )
        wheel.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        wheels.rename(folder)
    return folder / "circuit_tracer"


def libraries() -> Path:
    """Returns the folder of the page's libraries, installed by npm if need be."""
    folder = _cache() / "libraries"
    lock = (LOCK / "package-lock.json").read_bytes()
    known = folder / "package-lock.json"
    if not known.is_file() or known.read_bytes() != lock:
        partial = folder.with_name(f"libraries-{os.getpid()}")
        shutil.copytree(LOCK, partial)
        npm = shutil.which("npm")
        assert npm, f"{NEEDED} npm, for the page's libraries"
        _ran([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], "the page's libraries", partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder / "node_modules"


@contextmanager
def served(graphs: Path) -> Iterator[str]:
    """Runs circuit-tracer's server on a folder of graphs, on the loopback address alone; hands out its address."""
    folder = package()
    # The module asks for the folder of its package, whose own imports need a whole language model library.
    stub = types.ModuleType("circuit_tracer")
    stub.__path__ = [str(folder)]
    stub.__spec__ = importlib.util.spec_from_file_location(
        "circuit_tracer", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    spec = importlib.util.spec_from_file_location(
        "circuit_tracer.frontend.local_server", folder / "frontend" / "local_server.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["circuit_tracer"] = stub
    try:
        spec.loader.exec_module(module)
        whole = module.ReusableTCPServer
        module.ReusableTCPServer = lambda address, handler: whole(("127.0.0.1", address[1]), handler)
        server = module.serve(str(graphs), frontend_dir=str(folder / "frontend" / "assets"), port=0)
        module.logger.disabled = True  # it tells of every request
    finally:
        del sys.modules["circuit_tracer"]
    try:
        yield f"http://127.0.0.1:{server.httpd.server_address[1]}/"
    finally:
        server.httpd.shutdown()
        server.stop()


def hand_out(context: Any, address: str) -> list[str]:
    """Makes a browser's pages take their libraries from npm's packages; returns the requests that went elsewhere."""
    folder, beyond = libraries(), []

    def answer(route: Any) -> None:
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            return route.continue_()
        name = next((part for part in LIBRARIES if part in url.rpartition("/")[2]), None)
        if name is None:
            beyond.append(url)
            return route.abort()
        parts = [(folder / file).read_text(encoding="utf-8") for file in LIBRARIES[name]]
        parts += [DRAWS_AXES] if name == "jetpack" else []
        return route.fulfill(content_type="text/javascript", body=";\n".join(parts))

    context.route("**/*", answer)
    return beyond
