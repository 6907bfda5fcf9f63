"""Products in bfloat16 with float32 accumulation, in a program written without them (docs/method.md, section 8).

`rounded(f)` traces f and evaluates what it does, primitive by primitive, with one change: the operands of every matrix
product are rounded to bfloat16, and the products summed in float32. Sums, norms and exponentials stay as they are, and
so do products that ask for the highest precision by name, such as the scores of a recorded attention pattern. On a TPU
JAX's default precision does the same; here it is the same on every platform, so that its error can be measured on any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "remat")
_EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its matrix products in bfloat16, summed in float32.

    Args:
        function: of arrays or trees of them; it is traced when the result is called.
    """

    def with_rounding(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return with_rounding


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Evaluates a jaxpr with rounded products."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        outputs = _equation(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, args: list[Any]) -> list[Any]:
    """Evaluates one primitive: products rounded, bodies of loops and calls with theirs rounded, all else unchanged."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general" and params["precision"] != _EXACT:
        return [_product(args[0], args[1], params)]
    if name in _INLINED:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        # Checkpoints hold an open jaxpr, calls a closed one.
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), args)
    if name == "scan":
        return _scan(args, params)
    if name == "while":
        return _while(args, params)
    if name == "cond":
        branches = [partial(_call, branch) for branch in params["branches"]]
        return list(jax.lax.switch(args[0], branches, *args[1:]))
    found = equation.primitive.bind(*args, **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _call(closed: Any, *args: Any) -> tuple[Any, ...]:
    return tuple(_evaluate(closed.jaxpr, closed.consts, args))


def _product(a: Any, b: Any, params: dict[str, Any]) -> Any:
    if a.dtype != b.dtype or not jnp.issubdtype(a.dtype, jnp.floating):
        return jax.lax.dot_general_p.bind(a, b, **params)
    wide = jnp.promote_types(a.dtype, jnp.float32)
    halves = (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    found = jax.lax.dot_general(*halves, params["dimension_numbers"], preferred_element_type=jnp.float32)
    return found.astype(params["preferred_element_type"] or wide)


def _scan(args: list[Any], params: dict[str, Any]) -> list[Any]:
    constants, carries = params["num_consts"], params["num_carry"]
    fixed, begin, over = args[:constants], args[constants : constants + carries], args[constants + carries :]

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        found = _call(params["jaxpr"], *fixed, *carry, *xs)
        return found[:carries], found[carries:]

    options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    carry, stacked = jax.lax.scan(step, tuple(begin), tuple(over), **options)
    return [*carry, *stacked]


def _while(args: list[Any], params: dict[str, Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body, begin = args[:first], args[first : first + second], args[first + second :]
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    return list(
        jax.lax.while_loop(
            lambda carry: _call(cond, *for_cond, *carry)[0], lambda carry: _call(body, *for_body, *carry), tuple(begin)
        )
    )
