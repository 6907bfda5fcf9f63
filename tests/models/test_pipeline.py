"""From prompt to image: the golden runs, diffusers' own pipelines, and every size that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from converters.export import export_pipeline
from converters.torch_files import torch_noise
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline
from difffract_jax.models import pipeline
from difffract_jax.models.pipeline import (
    decode_latents,
    decode_raw,
    encode,
    generate,
    initial_noise,
    model_velocity,
    plan_run,
    sample,
)
from difffract_jax.models.sampler import pack
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.sharding import make_mesh, pipeline_shardings
from tolerances import REFERENCE, TOL, relative_error
from traces import DEV, PROMPTS, SIZE


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(REFERENCE / "golden_forward.npz"))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(REFERENCE / "pipeline")


@pytest.fixture(scope="module")
def tiny():
    return random_pipeline()


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_embeddings_are_met(pipe, golden, prompt):
    encoded = encode(pipe, PROMPTS[prompt], 16)
    assert relative_error(encoded.text, golden[f"p{prompt}_prompt_embeds"]) <= TOL.f32_block
    assert relative_error(encoded.pooled, golden[f"p{prompt}_pooled"]) <= TOL.f32_block
    assert np.array_equal(encoded.mask, np.cumsum(golden[f"p{prompt}_t5_input_ids"] == 1) - encoded.mask < 1)


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_latents_are_met_at_every_step(pipe, golden, prompt):
    run = plan_run(pipe.config, **SIZE)
    encoded = encode(pipe, PROMPTS[prompt], 16)
    for steps in range(5):
        noise = initial_noise(pipe, run, 0, golden[f"p{prompt}_initial_latents"])
        latents = sample(model_velocity, pipe.transformer, run, encoded, noise, stop=steps)
        assert relative_error(latents, golden[f"p{prompt}_latents"][steps]) <= TOL.f32_run


@pytest.mark.parametrize("prompt", [0, 1])
def test_golden_images_are_met(pipe, golden, prompt):
    raw = decode_raw(pipe.vae, jnp.asarray(golden[f"p{prompt}_final_latents"]), (6, 6))
    assert relative_error(raw.transpose(2, 0, 1), golden[f"p{prompt}_vae_raw"]) <= TOL.f32_block
    made = generate(pipe, PROMPTS[prompt], latents=golden[f"p{prompt}_initial_latents"], run=pipe.plan(**SIZE))
    assert relative_error(made.latents, golden[f"p{prompt}_final_latents"]) <= TOL.f32_run
    # One level of 255: errors of the run may push a pixel over the edge between two.
    assert np.max(np.abs(made.image - 255 * golden[f"p{prompt}_image"])) <= 1
    assert made.cut == ""


@pytest.mark.parametrize(
    ("shape", "height", "width", "steps"), [(TINY, 24, 40, 3), (DEV, 48, 16, 5)], ids=["schnell", "dev"]
)
def test_the_image_of_a_seed_is_diffusers(tmp_path, shape, height, width, steps):
    ours = random_pipeline(seed=1, transformer=shape)
    export_pipeline(ours, tmp_path / "out")
    theirs = FluxPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    prompt, size = "a red circle left of a blue square", {"height": height, "width": width}
    arguments = {"num_inference_steps": steps, "max_sequence_length": 40, "guidance_scale": 2.5, **size}
    generator = torch.Generator("cpu").manual_seed(5)
    latents = theirs(prompt, generator=generator, output_type="latent", **arguments).images[0]
    image = theirs(prompt, generator=generator.manual_seed(5), output_type="np", **arguments).images[0]
    noise = pack(torch_noise(5, 4, height // 4, width // 4)[0].transpose(1, 2, 0))
    guidance = 2.5 if shape.guidance else None
    made = generate(ours, prompt, latents=noise, run=ours.plan(steps=steps, text_tokens=40, guidance=guidance, **size))
    assert relative_error(made.latents, latents) <= TOL.f32_run
    assert np.max(np.abs(made.image - 255 * image)) <= 1


def test_a_run_compiles_one_step(tiny):
    pipeline.euler_step.clear_cache()
    for prompt, seed, steps in (("a red circle", 0, 4), ("a blue square", 1, 3)):
        generate(tiny, prompt, seed=seed, run=tiny.plan(steps=steps, height=32, width=32))
    assert pipeline.euler_step._cache_size() == 1


def test_the_seed_decides_and_nothing_else(tiny):
    images = [generate(tiny, "a red circle", seed=seed, run=tiny.plan(steps=2)).image for seed in (3, 3, 4)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert images[0].shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("text_tokens", "height", "width"),
    [(1, 24, 56), (70, 8, 8), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 8, 8), (70, 24, 56)))],
)
def test_any_size_that_divides_gives_an_image(tiny, text_tokens, height, width):
    made = generate(tiny, "a red circle", run=tiny.plan(steps=1, height=height, width=width, text_tokens=text_tokens))
    assert made.image.shape == (height, width, 3) and made.image.dtype == np.uint8
    assert (made.cut == "") == (text_tokens == 70)


def test_a_batch_of_decodings_is_a_vmap(tiny):
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
    together = jax.vmap(lambda z: decode_raw(tiny.vae, z, (2, 3)))(latents)
    assert relative_error(together[1], decode_raw(tiny.vae, latents[1], (2, 3))) <= TOL.f32_block


def test_bfloat16_generates_what_float32_does_but_for_rounding():
    half = random_pipeline(dtype=jnp.bfloat16)
    whole = half._replace(
        **{
            n: jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.float32)), getattr(half, n))
            for n in ("transformer", "t5", "clip", "vae")
        }
    )
    ours, exact = (generate(p, "a red circle", run=p.plan(height=24, width=24)) for p in (half, whole))
    assert ours.latents.dtype == jnp.float32
    # Four steps and five blocks of single roundings of 4e-3 each.
    assert relative_error(ours.latents, exact.latents) <= 4 * TOL.bf16


@pytest.mark.slow
def test_eight_devices_generate_what_one_does(pipe, golden):
    place = pipeline_shardings(make_mesh({"data": 2, "feature": 4}))
    parts = {name: getattr(pipe, name) for name in ("transformer", "t5", "clip", "vae")}
    spread = pipe._replace(**{name: jax.device_put(tree, place(name, tree)) for name, tree in parts.items()})
    noise = golden["p0_initial_latents"]
    ours, alone = (generate(p, PROMPTS[0], latents=noise, run=p.plan(**SIZE)) for p in (spread, pipe))
    assert relative_error(ours.latents, alone.latents) <= TOL.f32_run
    assert np.max(np.abs(ours.image.astype(int) - alone.image)) <= 1


def test_progress_is_told_after_every_step(tiny):
    seen = []
    generate(tiny, "a", progress=lambda done, total: seen.append((done, total)), run=tiny.plan(steps=3))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"height": 50}, "multiples of 8 pixels, but got 48 x 50; the nearest size is 48 x 48."),
        ({"width": 0}, "multiples of 8 pixels, but got 0 x 48; the nearest size is 8 x 48."),
        ({"height": -8}, "multiples of 8 pixels, but got 48 x -8"),
        ({"steps": 0}, "steps must be at least 1, but got 0"),
        ({"text_tokens": 0}, "text_tokens must be at least 1, but got 0"),
        ({"guidance": 3.5}, "takes no guidance scale (FLUX.1-dev does), but got 3.5; leave it out."),
        (
            {"latents": np.zeros((35, 16))},
            "of shape (36, 16) (image tokens, channels) for this image size, but got (35",
        ),
        ({"latents": np.full((36, 16), np.nan)}, "must be finite, but hold NaN or infinity."),
    ],
)
def test_what_does_not_fit_is_refused(tiny, change, sentence):
    with pytest.raises(UserError) as caught:
        run = tiny.plan(**{name: value for name, value in change.items() if name != "latents"})
        generate(tiny, "a red circle", run=run, latents=change.get("latents"))
    assert sentence in str(caught.value)


def test_pixels_are_clipped_and_rounded(tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "decode_raw", lambda *_: jnp.asarray([[[-2.0, 0.0, 3.0]]]))
    assert decode_latents(tiny, jnp.zeros((1, 16)), (1, 1)).tolist() == [[[0, 128, 255]]]
