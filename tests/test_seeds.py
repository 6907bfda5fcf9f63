"""Seeds: all 64 bits count, those below 2**32 draw what they always drew, and what is not a seed is refused."""

import jax
import numpy as np
import pytest

from converters.torch_files import torch_noise, torch_seed
from difffract_jax.circuits.editing.ranking import rank_features
from difffract_jax.circuits.editing.sweeps import sweep
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.cli.runs import torch_latents
from difffract_jax.cli.settings import SteerConfig
from difffract_jax.config import GenerateConfig, UserError, resolve
from difffract_jax.generators import check_seed, random_generator
from difffract_jax.models.pipeline import plan_run
from difffract_jax.models.sampler import draw_noise
from difffract_jax.models.tiny import random_pipeline, random_weights
from difffract_jax.organism.recipe import OrganismRecipe
from difffract_jax.organism.world import scenes
from difffract_jax.seeds import random_key
from difffract_jax.transcoders.harvest import Sampler
from difffract_jax.transcoders.prompts import PromptFile
from difffract_jax.transcoders.settings import HarvestConfig, TrainConfig
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import random_transcoders

SMALL = (0, 5, 2**31, 2**32 - 1)
ALIKE = (5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 2**64 - 2**32 + 5)
"""Seeds that have their lower 32 bits in common."""


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.mark.parametrize("seed", SMALL)
def test_a_seed_below_two_to_the_32_draws_what_jax_and_numpy_draw(seed):
    assert np.array_equal(draw_noise(seed, (2, 3), 4), jax.random.normal(jax.random.key(seed), (6, 4)))
    assert random_generator(seed, 3, 1).random() == np.random.default_rng([seed, 3, 1]).random()
    assert random_generator(seed).random() == np.random.default_rng(seed).random()


@pytest.mark.parametrize("seed", [*SMALL, *ALIKE[1:3], 2**63 - 1])
def test_a_key_is_jax_s_own_under_x64(seed):
    ours = jax.random.key_data(random_key(seed))
    with jax.enable_x64(True):
        assert np.array_equal(ours, jax.random.key_data(jax.random.key(seed)))
        assert np.array_equal(ours, jax.random.key_data(random_key(seed)))


def drawn_by(kind, seed, pipe):
    """Returns an array of random numbers that a part of the package draws from a seed."""
    run = plan_run(pipe.config, steps=1, height=16, width=16, text_tokens=8)
    abstract = {"kernel": jax.ShapeDtypeStruct((4, 2**18), np.float32)}
    sampler = Sampler(pipe, sites_of({"img": (0,)}), run, str, seed, prompts_at_once=1, tokens_per_step=2)
    ways = {
        "noise": lambda: draw_noise(seed, (2, 2), 4),
        "harvested noise": lambda: sampler.noise(np.array([0])),
        "harvested tokens": lambda: [sampler._choose(n, np.ones((1, 8), bool))[0]["img"] for n in range(8)],
        "transcoders": lambda: random_transcoders(pipe.config.transformer, seed=seed).stacks["img"].dec.kernel[0],
        "weights": lambda: random_weights(abstract, seed)["kernel"][0, :9],
        "weights on the device": lambda: random_weights(abstract, 4 * seed, on_device=True)["kernel"][0, :9],
        "scenes": lambda: scenes(seed, 0, 4).images(),
        "order of prompts": lambda: [PromptFile(tuple(map(str, range(99))), seed)(n) for n in range(5)],
    }
    return np.asarray(ways[kind]())


KINDS = "noise,harvested noise,harvested tokens,transcoders,weights,weights on the device,scenes,order of prompts"


@pytest.mark.parametrize("kind", KINDS.split(","))
def test_seeds_that_share_their_lower_half_draw_different_numbers(kind, pipe):
    drawn = [drawn_by(kind, seed, pipe) for seed in ALIKE]
    assert not [i for i, one in enumerate(drawn) for other in drawn[:i] if np.array_equal(one, other)]
    assert np.array_equal(drawn[1], drawn_by(kind, ALIKE[1], pipe))


def test_the_upper_half_of_a_seed_is_not_taken_for_the_number_of_a_draw():
    assert np.random.default_rng([2**32 + 5, 0]).random() == np.random.default_rng([5, 1]).random()
    draws = {random_generator(seed, *numbers).random() for seed in ALIKE for numbers in [(), (1,), (1, 0, 2), (2, 1)]}
    assert len(draws) == 4 * len(ALIKE)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed, pipe):
    told = f"A seed must be a whole number from 0 to 2\\*\\*64 - 1 = 18446744073709551615, but got {seed}"
    for make in (lambda: draw_noise(seed, (1, 1), 4), lambda: torch_noise(seed, 4, 2, 2)):
        with pytest.raises(UserError, match=told):
            make()
    with pytest.raises(UserError, match=told):
        random_pipeline(seed=seed)
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    with pytest.raises(UserError, match="must be a whole number .* but got 0.5"):
        check_seed(0.5)


@pytest.mark.parametrize(
    ("cls", "needed"),
    [
        (GenerateConfig, {"model": "m", "prompt": "p"}),
        (TrainConfig, {"model": "m", "out": "o", "prompts": "p"}),
        (HarvestConfig, {"model": "m", "out": "o", "prompts": "p"}),
        (OrganismRecipe, {}),
    ],
)
def test_settings_take_all_seeds_of_64_bits_and_no_others(cls, needed):
    assert resolve(cls, needed | {"seed": 2**64 - 1}).seed == 2**64 - 1
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=rf"`seed` was {seed}, but input should be (greater|less) than"):
            resolve(cls, needed | {"seed": seed})


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ("7,7", "`seeds` was '7,7', but every seed counts once, and 7 occurs more than once"),
        ("0..5,3", "every seed counts once, and 3 occurs more than once"),
        ("0,18446744073709551616", "a seed lies in 0..18446744073709551615"),
        ("0..18446744073709551615", "at most 100000 seeds"),
    ],
)
def test_lists_of_seeds_that_cannot_be_are_refused(seeds, told):
    given = {"model": "m", "transcoders": "t", "prompt": "p", "edit": ("img/0/f1=zero",)}
    with pytest.raises(UserError, match=told):
        resolve(SteerConfig, given | {"seeds": seeds})
    big = resolve(SteerConfig, given | {"seeds": "18446744073709551614..18446744073709551615,0"})
    assert big.seed_list == (2**64 - 2, 2**64 - 1, 0)


def test_python_s_lists_of_seeds_name_each_once(pipe):
    tcs = random_transcoders(pipe.config.transformer)
    with pytest.raises(UserError, match="given once, but 7 occurs more than once"):
        sweep(pipe, tcs, "a fox", [Edit.parse("img/0/f1=zero")], seeds=(7, 8, 7))
    with pytest.raises(UserError, match="given once, but 7 occurs more than once"):
        rank_features(pipe, tcs, "a fox", seeds=(7, 7))


def test_pytorch_s_noise_is_diffusers_and_not_counted_twice(pipe, capsys):
    assert np.array_equal(torch_noise(2**32 + 5, 4, 2, 2), torch_noise(torch_seed(2**32 + 5), 4, 2, 2))
    with pytest.raises(UserError, match=r"PyTorch's generator reads the lower 32 bits.*--seeds below 2\*\*32"):
        torch_latents(pipe, (1, 1), [5, 2**32 + 5])
    assert torch_latents(pipe, (1, 1), [2**32 + 5]).shape[0] == 1
    assert "its noise of 4294967301 is that of 5" in capsys.readouterr().err
