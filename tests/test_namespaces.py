"""The namespaces give every name they list, lazily, each with a docstring."""

import logging
import subprocess
import sys
from importlib import import_module

import pytest

import difffract_jax as dfx


@pytest.mark.parametrize("package", ["graphs", "circuits", "transcoders"])
def test_every_public_name_of_a_namespace_resolves_and_explains_itself(package: str) -> None:
    namespace = getattr(dfx, package)
    assert namespace is import_module(f"difffract_jax.{package}")
    assert dir(namespace) == sorted(namespace.__all__)
    for name in namespace.__all__:
        value = getattr(namespace, name)
        # A module of the same name would hide the function as soon as anything imports it.
        assert callable(value) and value.__name__ == name and value.__doc__, f"{package}.{name}"
    with pytest.raises(AttributeError, match=f"module 'difffract_jax.{package}' has no attribute 'nothing'"):
        _ = namespace.nothing


def test_what_the_commands_do_has_a_name() -> None:
    for name in ("prune", "find_supernodes", "write_viewer_json", "compare", "average", "difference", "write_csv"):
        assert callable(getattr(dfx.graphs, name))
    for name in (
        "parse_target",
        "resolve_target",
        "validate",
        "head_loadings",
        "total_effects",
        "steer",
        "rank_features",
    ):
        assert callable(getattr(dfx.circuits, name))
    assert callable(dfx.transcoders.train) and callable(dfx.transcoders.evaluate)


def test_naming_a_namespace_loads_no_jax() -> None:
    code = "import sys, difffract_jax as dfx; dfx.graphs.prune; dfx.circuits; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_that_pytorch_is_missing_is_not_told_and_other_warnings_are(caplog):
    logger = logging.getLogger("transformers")
    with caplog.at_level("WARNING", "transformers"):
        logger.addHandler(caplog.handler)
        logger.warning("PyTorch was not found. Models won't be available.")
        logger.warning("something else")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something else"}
