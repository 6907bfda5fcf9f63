"""Compiled programs that are kept: linked, published whole, bounded, swept; and used by the next process."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.compilation_cache import compress_executable
from jax.sharding import NamedSharding, PartitionSpec

from difffract_jax.sharding import make_mesh
from difffract_jax.storage import compile_cache
from difffract_jax.storage.compile_cache import enable_compile_cache, link_programs, publish, sweep, user_cache

PROGRAM = compress_executable(b"program" * 1000)

COUNT_HITS = """
import sys, warnings
warnings.simplefilter("error")
import difffract_jax as dfx
if sys.argv[2] == "late":
    import jax
    jax.jit(lambda x: x + 1)(1.0)
assert dfx.enable_compile_cache(sys.argv[1]) is not None
assert dfx.enable_compile_cache(sys.argv[1]) is None, "once is enough"
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
warnings.warn("Error writing persistent compilation cache entry for 'f': No space left on device")
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((5, 5)))), len(hits))
"""


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "jax-1"
    folder.mkdir()
    (folder / "old-cache").write_bytes(b"old")
    return folder


@pytest.fixture
def unset(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "sys", SimpleNamespace(modules={}))  # as before JAX is imported


def test_the_next_process_reads_what_one_has_compiled(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    runs = [
        subprocess.run(
            [sys.executable, "-c", COUNT_HITS, str(tmp_path), when],
            env=clean | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for when in ("early", "late")
    ]
    assert runs[0][0] == runs[1][0], "a program that is read computes the same"
    assert int(runs[0][1]) == 0 < int(runs[1][1])
    assert [folder.name[:4] for folder in tmp_path.iterdir()] == ["jax-"], "no process leaves a folder of its own"


@pytest.mark.parametrize("devices", [1, 2])
def test_programs_of_several_cpu_devices_are_neither_kept_nor_loaded(devices):
    requests = []

    def listen(name, **_):
        requests.append(name.endswith("compile_requests_use_cache"))

    mesh = make_mesh({"feature": devices}, jax.devices()[:devices])
    rows = jax.device_put(np.ones((4, 4), np.float32), NamedSharding(mesh, PartitionSpec("feature")))
    jax.monitoring.register_event_listener(listen)
    try:
        assert float(jax.jit(lambda x: (x * 3 + 5).sum())(rows)) == 128.0
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert any(requests) == (devices == 1)


def test_a_jax_without_the_function_goes_on_without_its_cache(monkeypatch):
    changed = []
    monkeypatch.delattr("jax._src.compiler.backend_compile_and_load")
    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", lambda *_: None)
    monkeypatch.setattr("jax.config.update", lambda name, value: changed.append((name, value)))
    monkeypatch.setattr(
        "jax.experimental.compilation_cache.compilation_cache.reset_cache", lambda: changed.append("reset")
    )
    compile_cache.compile_cpu_meshes_anew()
    assert changed == [("jax_enable_compilation_cache", False), "reset"]


def test_a_process_sees_finished_programs_and_publishes_whole_ones(shared):
    one, other = link_programs(shared), link_programs(shared)
    assert (one / "old-cache").read_bytes() == b"old"
    (one / "new-cache").write_bytes(PROGRAM[:10])
    assert not (shared / "new-cache").exists() and not (other / "new-cache").exists()
    (one / "new-cache").write_bytes(PROGRAM)
    publish(one, shared)
    assert (shared / "new-cache").read_bytes() == PROGRAM


def test_half_a_program_as_a_full_disk_or_an_interrupt_leaves_it_is_not_published(shared):
    own = link_programs(shared)
    for length in (0, 1, len(PROGRAM) - 1):
        (own / f"cut-{length}-cache").write_bytes(PROGRAM[:length])
    (own / "whole-cache").write_bytes(PROGRAM)
    publish(own, shared)
    assert sorted(path.name for path in shared.iterdir()) == ["old-cache", "whole-cache"]


def test_processes_that_end_at_once_publish_all_their_programs(shared):
    owns = [link_programs(shared) for _ in range(8)]
    for number, own in enumerate(owns):
        for name in ("same", f"own{number}"):
            (own / f"{name}-cache").write_bytes(PROGRAM)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda own: publish(own, shared), owns))
    assert len(list(shared.iterdir())) == 2 + len(owns)
    assert {path.read_bytes() for path in shared.glob("*own*")} == {PROGRAM}


def test_what_killed_processes_leave_is_swept_and_what_running_ones_hold_stays(shared):
    root, running = shared.parent, link_programs(shared)
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    numbering = running.name.split("-")[1]
    killed = root / f".run-{numbering}-{over.pid}-x"
    killed.mkdir()
    sweep(root)
    assert running.exists() and not killed.exists()


@pytest.mark.parametrize("other", ["0123abcd", "login-1", "login"])
def test_folders_of_other_machines_and_containers_that_share_a_home_go_when_they_are_old(shared, other):
    recent, old = (shared.parent / f".run-{other}-1-{age}" for age in ("recent", "old"))
    for folder in (recent, old):
        folder.mkdir()
    month = 31 * 24 * 3600
    os.utime(old, (old.stat().st_mtime - month,) * 2)
    sweep(shared.parent)
    assert recent.exists() and not old.exists()


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_a_user_s_own_setting_is_left_alone(name, unset, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "0")
    assert enable_compile_cache() is None
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_done_without(unset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert enable_compile_cache() is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_user_without_a_home_is_done_without(unset, monkeypatch):
    def refuse(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", refuse)
    assert enable_compile_cache() is None


def test_a_relative_cache_directory_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert user_cache() == tmp_path / ".cache" / "difffract"


def test_a_file_system_without_links_is_done_without(unset, monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(compile_cache.os, "link", refuse)
    monkeypatch.setattr(compile_cache, "version", lambda _: "1")
    monkeypatch.setattr(compile_cache, "processor", lambda: "any")
    folder = tmp_path / "difffract" / "programs" / "jax-1-any"
    folder.mkdir(parents=True)
    (folder / "old-cache").write_bytes(b"old")
    assert enable_compile_cache() is None
    assert [path.name for path in folder.parent.iterdir()] == ["jax-1-any"]
