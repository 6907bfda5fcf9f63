"""Devices by name, and the share of a GPU that commands let JAX take."""

import pytest

from difffract_jax.config import UserError
from difffract_jax.estimate.places import GPUS, Place, read_place
from difffract_jax.memory import GPU_SHARE, host_memory, share_memory
from difffract_jax.transcoders.plan import GIB, HBM


def test_devices_are_read() -> None:
    assert read_place("24GB") == Place("24GB", "gpu", 1, round(GPU_SHARE * 24e9))
    assert read_place("H100") == Place("h100", "gpu", 1, round(GPU_SHARE * GPUS["h100"] * 2**20))
    assert read_place("v5e:2x4") == Place("v5e:2x4", "tpu", 8, round(HBM["v5e"] * GIB))
    assert read_place("v5p").name == "v5p:4x4x4"
    assert read_place("host:16GB") == Place("host:16GB", "host", 1, 16 * 10**9)
    here = read_place("host")
    assert here.kind == "host" and 0 < here.usable <= host_memory().total


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_has_about_the_memory_it_is_sold_with(name: str) -> None:
    assert 14_000 < GPUS[name] < 200_000
    assert read_place(name).usable < GPUS[name] * 2**20


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h10", "did you mean `h100`?"),
        ("", "give a memory as in 24GB"),
        ("24", "as in 24GB"),
        ("v5e:2y4", "as in v5e:8x8"),
        ("host:lots", "as in 16GB"),
        ("h100:2", "is not a device"),
    ],
)
def test_what_is_no_device_is_refused_in_a_sentence(name: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        read_place(name)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_jax_takes_more_of_a_gpu_unless_the_user_has_said_how_much() -> None:
    empty: dict[str, str] = {}
    share_memory(empty)
    assert empty == {"XLA_CLIENT_MEM_FRACTION": "0.92"}
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        given = {name: "0.5"}
        share_memory(given)
        assert given == {name: "0.5"}
