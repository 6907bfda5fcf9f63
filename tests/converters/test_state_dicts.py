"""State dicts are found in what is saved around them; numbers stand for tensors here."""

import pytest

from converters.state_dicts import NotFound, find_state, unwrapped

STATE = {"encoder.weight": 1.0, "encoder.bias": 2.0}
WANTED = "encoder.weight"


def find(content):
    return find_state(content, lambda value: isinstance(value, float), WANTED)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        STATE | {"step": 3, "name": "x", "config": {"width": 4}},
        {"model_state_dict": STATE, "step": 5, "config": {"a": 1}, "optimizer": {"state": {0: {"exp_avg": 1.0}}}},
        {"state_dict": STATE, "hyper_parameters": {}},
        {"checkpoint": {"model": {"transcoder": STATE}}},
        {"model": {f"module.{key}": value for key, value in STATE.items()}, "mean": {"input": 1.0}},
    ],
)
def test_the_one_state_dict_of_a_file_is_found(content):
    assert unwrapped(find(content), WANTED) == STATE


@pytest.mark.parametrize("content", [[1.0], {}, {"step": 3}, {"config": {"a": [1.0]}}, 1.0, None])
def test_a_file_without_one_says_so(content):
    with pytest.raises(NotFound, match="holds no state dict of tensors"):
        find(content)


def test_of_two_both_are_named():
    with pytest.raises(NotFound, match="holds 2 state dicts, model and ema.shadow, of which one must be saved alone"):
        find({"model": STATE, "ema": {"shadow": STATE}, "step": 3})
    with pytest.raises(NotFound, match="2 state dicts, its top level and ema"):
        find(STATE | {"ema": STATE})
    with pytest.raises(NotFound, match="holds 2 modules, its top level and teacher, of which one"):
        unwrapped(STATE | {f"teacher.{key}": value for key, value in STATE.items()}, WANTED)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "sae.", "transcoder.net."]
)
def test_what_all_keys_share_is_taken_away(prefix):
    assert unwrapped({f"{prefix}{key}": value for key, value in STATE.items()}, WANTED) == STATE


def test_a_module_compiled_within_another_keeps_its_place():
    assert unwrapped({"encoder._orig_mod.weight": 1.0, "encoder._orig_mod.bias": 2.0}, WANTED) == STATE


def test_a_prefix_that_one_key_lacks_stays():
    mixed = {"module.encoder.weight": 1.0, "encoder.bias": 2.0}
    assert unwrapped(mixed, WANTED) == mixed
    assert unwrapped({"a.bias": 1.0}, WANTED) == {"a.bias": 1.0}
    both = {"encoder.bias": 1.0, "_orig_mod.encoder.bias": 2.0}
    assert unwrapped(both, WANTED) == both
