"""The cache of compiled programs: where it is, what it may hold, and that it changes no result."""

import os
import subprocess
import sys

import compiled

READ_TWICE = """
import pathlib, sys, warnings
import jax, jax.numpy as jnp, numpy as np

def run():
    def body(x, w):
        return jnp.tanh(x @ w), x.sum()
    step = lambda x, w: jax.lax.scan(body, x, w)
    x, w = (jax.random.normal(jax.random.key(0), shape) for shape in ((5, 16), (7, 16, 16)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(step)(x, w))]

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
first, before = run(), len(hits)
second, read = run(), len(hits)
assert read > before, "the second time programs are read"
for path in pathlib.Path(sys.argv[1]).glob("*-cache"):
    path.write_bytes(path.read_bytes()[:-9])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    third = run()
assert len(hits) == read and any("Error reading persistent compilation cache entry" in str(one.message) for one in told)
for other in (second, third):
    assert all(map(np.array_equal, first, other))
"""


def test_programs_that_are_read_compute_the_same_and_half_written_ones_are_compiled(tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", READ_TWICE, str(tmp_path)], env=os.environ | given, check=True)


def test_the_cache_lies_with_the_user_s_others(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    compiled.share()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine" and not list(tmp_path.iterdir())
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    compiled.share()
    (folder,) = (tmp_path / "difffract-tests").iterdir()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder) and folder.name.startswith("jax-")
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"


def test_a_cache_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compiled.share()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for number, (folder, used) in enumerate([("a", 300), ("a", 100), ("b", 400), ("b", 200)]):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"{number}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (used, 50))
    compiled.CACHE["bound"](tmp_path, 40)
    assert len(list(tmp_path.glob("*/*"))) == 4
    compiled.CACHE["bound"](tmp_path, 25)
    assert {path.name for path in tmp_path.glob("*/*")} == {"0-cache", "2-cache"}
