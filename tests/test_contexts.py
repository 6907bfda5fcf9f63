"""Programs that share a context are the same as those with one of their own."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from contexts import Reused
from jax._src.interpreters import mlir


def test_a_context_is_given_again_and_then_changed():
    made = iter(range(9))
    get = Reused(lambda: next(made), uses=3)
    assert [get() for _ in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    with ThreadPoolExecutor(1) as pool:
        assert [pool.submit(get).result() for _ in range(2)] == [3, 4]
    assert get() == 2


def test_programs_of_one_context_are_those_of_two(monkeypatch):
    def texts(give):
        monkeypatch.setattr(mlir, "make_ir_context", give)
        functions = (lambda x: jnp.tanh(x) @ x.T, lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x))
        return [jax.jit(one).lower(jnp.ones((n, 3))).as_text() for n in (2, 5) for one in functions]

    own = []

    def fresh():
        own.append(make())
        return own[-1]

    assert isinstance(mlir.make_ir_context, Reused), "JAX makes contexts in another way now: see tests/contexts.py"
    make = mlir.make_ir_context.make
    expected = texts(fresh)
    assert len(own) >= len(expected) == 4
    assert texts(Reused(make)) == expected
