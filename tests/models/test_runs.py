"""What a run of a pipeline is: lengths of its sequences that a model cannot have are refused."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from difffract_jax.config import UserError
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.runs import plan_run
from difffract_jax.models.tiny import random_pipeline


@dataclass(frozen=True, kw_only=True)
class InUnits(FluxConfig):
    """A shape whose sequences come in units."""

    text_unit: ClassVar[int] = 8
    image_unit: ClassVar[int] = 32


@pytest.fixture(scope="module")
def config():
    made = random_pipeline().config
    return replace(made, transformer=InUnits(**vars(made.transformer)))


@pytest.mark.parametrize(
    ("height", "width", "text_tokens", "message"),
    [
        (32, 64, 12, r"multiples of 8 tokens, but text_tokens is 12; take 16\."),
        (32, 64, 3, r"text_tokens is 3; take 8\."),
        (
            24,
            32,
            8,
            r"multiples of 32 tokens, .* 32 x 24 pixels are 12; the next width that fits is 256 \(multiples of 64",
        ),
    ],
)
def test_a_length_that_is_no_multiple_is_refused_with_the_nearest(config, height, width, text_tokens, message):
    with pytest.raises(UserError, match=message) as error:
        plan_run(config, height=height, width=width, text_tokens=text_tokens)
    assert "\n" not in str(error.value)


def test_multiples_on_both_sides_fit(config):
    for height, width in ((64, 64), (32, 64), (128, 64)):
        assert plan_run(config, height=height, width=width, text_tokens=16).tokens.img % 32 == 0
