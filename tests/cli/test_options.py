"""Options are the settings: the same help, no default of their own, and a missing one is wrong usage."""

import pytest
import typer

from difffract_jax.cli.options import field, settings_of
from difffract_jax.config import TraceConfig, UserError

GIVEN = {"model": "m", "transcoders": "t", "prompt": "p", "target": "img/0/f1"}


@pytest.mark.parametrize("name", ["max_nodes", "prompt", "noise", "include_padding"])
def test_help_is_the_setting_s_own_docstring(name):
    told = field(TraceConfig, name)["help"]
    info = TraceConfig.model_fields[name]
    assert told.startswith(" ".join(info.description.split()))
    assert (f"Default: {info.default}." in told) == (name in ("max_nodes", "noise"))


def test_what_is_not_given_is_left_to_the_settings():
    assert settings_of(TraceConfig, GIVEN | {"max_nodes": None}).max_nodes == 1000
    assert settings_of(TraceConfig, GIVEN | {"max_nodes": 7, "sets": ["max_nodes=8"]}).max_nodes == 8


def test_a_file_fills_in_what_is_missing_and_options_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ntranscoders: t\nprompt: p\ntarget: img/0/f1\nmax_nodes: 5\nstep: 2\n")
    settings = settings_of(TraceConfig, {"config": tmp_path / "a.yaml", "max_nodes": 6, "prompt": None})
    assert (settings.prompt, settings.max_nodes, settings.step) == ("p", 6, "2")


def test_what_is_missing_is_named():
    with pytest.raises(typer.BadParameter, match="TRANSCODERS, TARGET missing; see --help"):
        settings_of(TraceConfig, {"model": "m", "prompt": "p"})
    with pytest.raises(UserError, match="`target` is missing"):
        settings_of(TraceConfig, {"model": "m", "transcoders": "t", "prompt": "p", "sets": ["step=1"]})
