"""How often Python looks for garbage: seldom in commands that are brief, as ever in others and with large models."""

import gc

import pytest

from difffract_jax.cli import garbage
from difffract_jax.cli.commands import MODULES
from difffract_jax.cli.garbage import BRIEF, LARGE, SELDOM, often_if_large, seldom


@pytest.fixture(autouse=True)
def own():
    """Python's settings as a command finds them, which are not those of the tests."""
    before = gc.get_threshold()
    gc.set_threshold(*garbage._OWN)
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("command", "threshold"), [("validate", SELDOM), ("train", None), ("", None)])
def test_a_brief_command_looks_seldom_and_leaves_things_as_they_were(command, threshold) -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="stop"), seldom(command):
        assert gc.get_threshold()[0] == (threshold or before[0])
        raise ValueError("stop")
    assert gc.get_threshold() == before


def test_a_large_model_brings_the_usual_settings_back() -> None:
    before = gc.get_threshold()
    with seldom("trace"):
        often_if_large(LARGE - 1)
        assert gc.get_threshold()[0] == SELDOM
        often_if_large(LARGE)
        assert gc.get_threshold()[0] == before[0] < SELDOM
    assert gc.get_threshold() == before


def test_whoever_looks_more_seldom_still_is_left_to_it() -> None:
    gc.set_threshold(2 * SELDOM, 10, 10)
    with seldom("trace"):
        assert gc.get_threshold()[0] == 2 * SELDOM


def test_brief_commands_exist() -> None:
    assert set(BRIEF) <= set(MODULES)
