"""What every test runs under.

1. The CPU, pretending to be eight devices, so that sharding is tested without an accelerator.
2. No network: a library that would fetch something fails at once.
3. Matrix products at full float32 precision, which is what the tolerances assume.
4. The `x64` fixture: float64 and strict dtype promotion for the laws that hold exactly in real arithmetic.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402  (the environment above must be set first)
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in float64 with strict dtype promotion; both belong to jit's cache key, so nothing leaks out."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
