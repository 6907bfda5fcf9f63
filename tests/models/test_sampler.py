"""Schedules, packing and noise against diffusers', and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from difffract_jax.config import UserError
from difffract_jax.models.sampler import SchedulerConfig, draw_noise, pack, scale_for_decoder, sigmas, unpack
from tolerances import REFERENCE, TOL, relative_error


@pytest.fixture(scope="module")
def golden():
    return np.load(REFERENCE / "golden_forward.npz")


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("tokens", [36, 256, 1024, 4096])
@pytest.mark.parametrize(
    "config",
    [
        SchedulerConfig(),
        SchedulerConfig(shift=3.0),
        SchedulerConfig(use_dynamic_shifting=True, shift=3.0),
        SchedulerConfig(use_beta_sigmas=True, shift=3.0),
        SchedulerConfig(use_dynamic_shifting=True, use_karras_sigmas=True),
        SchedulerConfig(use_exponential_sigmas=True),
    ],
    ids=["schnell", "shifted", "dev", "beta", "karras", "exponential"],
)
def test_noise_levels_are_diffusers(config, steps, tokens):
    theirs = FlowMatchEulerDiscreteScheduler.from_config(vars(config))
    mu = calculate_shift(tokens, 256, 4096, config.base_shift, config.max_shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert relative_error(sigmas(config, steps, tokens), theirs.sigmas) <= TOL.f32_block


def test_schnell_s_levels_are_the_golden_ones(golden):
    assert np.array_equal(sigmas(SchedulerConfig(), 4, 36), golden["sigmas"])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_steps_is_refused(steps):
    with pytest.raises(UserError, match=f"steps must be at least 1, but got {steps}"):
        sigmas(SchedulerConfig(), steps, 36)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 1)])
def test_packing_is_diffusers_and_unpacking_undoes_it(grid):
    rows, columns = 2 * grid[0], 2 * grid[1]
    latent = np.random.default_rng(0).standard_normal((rows, columns, 4)).astype(np.float32)
    theirs = FluxPipeline._pack_latents(torch.from_numpy(latent.transpose(2, 0, 1)[None]), 1, 4, rows, columns)
    tokens = pack(latent)
    assert np.array_equal(tokens, theirs[0])
    assert np.array_equal(unpack(tokens, grid), latent)


@pytest.mark.parametrize("prompt", [0, 1])
def test_what_the_decoder_gets_is_golden(golden, prompt):
    latent = unpack(jnp.asarray(golden[f"p{prompt}_final_latents"]), (6, 6))
    ours = scale_for_decoder(latent, 0.3611, 0.1159).transpose(2, 0, 1)
    assert relative_error(ours, golden[f"p{prompt}_vae_in"]) <= TOL.f32_block


def test_noise_is_a_function_of_its_seed():
    noise = draw_noise(3, (40, 50), 16)
    assert noise.shape == (2000, 16) and noise.dtype == jnp.float32
    assert np.array_equal(noise, draw_noise(3, (40, 50), 16))
    assert np.array_equal(noise, jax.jit(lambda: draw_noise(3, (40, 50), 16))())
    assert not np.array_equal(noise, draw_noise(4, (40, 50), 16))
    # 32,000 samples: mean and deviation are known to 0.6% (one standard error).
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
