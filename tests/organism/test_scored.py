"""The scorer's view of replaced MLPs: which captions, which mask, and that both runs start from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import encode, model_velocity
from difffract_jax.organism import scored
from difffract_jax.organism.scored import AT_ONCE, accuracies, captions
from difffract_jax.organism.world import from_caption
from difffract_jax.transcoders.transcoder import random_transcoders
from traces import with_joint


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("organism")


@pytest.fixture(scope="module")
def tcs(pipe):
    return with_joint(random_transcoders(pipe.config.transformer, features=64))


def painted(text):
    return np.round(255 * from_caption(text).images()[0]).astype(np.uint8)


def test_captions_are_held_out_honest_and_the_same_every_time():
    asked = captions(300)
    assert asked.captions == captions(400).captions[:300]
    assert asked.held_out.all() and set(asked.count) == {1, 2}
    used = np.arange(asked.kind.shape[1]) < asked.count[:, None]
    assert not ((asked.named >= 0) & (asked.named != asked.colour) & used).any()


def test_both_draw_the_same_captions_from_the_same_noise_in_whole_batches(pipe, tcs, monkeypatch):
    seen = []

    def painter(pipe, prompts, seeds, *, velocity, params, batch):
        seen.append((tuple(prompts), tuple(seeds), velocity is model_velocity))
        assert len(prompts) == batch == AT_ONCE
        if velocity is not model_velocity:
            for prompt in prompts:
                mask = encode(pipe, prompt, pipe.config.defaults.text_tokens).mask
                np.testing.assert_array_equal(params.text_mask, mask[None])  # of one branch
        # What is replaced paints every second noise seed as it should be, and nothing else.
        images = np.stack([painted(prompt) for prompt in prompts])
        images[(np.array(seeds) % 2 == 1) & (velocity is not model_velocity)] = 255
        return images

    monkeypatch.setattr(scored, "generate_batch", painter)
    told = []
    rows = accuracies(pipe, tcs, 70, told.append)
    assert [(row["what"], row["images"], row["right"]) for row in rows] == [
        ("model", 70, 70),
        ("all MLPs replaced", 70, 35),
        ("both", 70, 35),
    ]
    assert told == sorted(told) and told[-1] == 70
    for (prompts, seeds, plain), (others, same, replaced) in zip(seen[::2], seen[1::2], strict=True):
        assert plain and not replaced and prompts == others and seeds == same
    drawn = {pair for prompts, seeds, _ in seen for pair in zip(prompts, seeds, strict=True)}
    assert len({seed for _, seed in drawn}) == len(drawn) == 70


def test_what_is_replaced_changes_the_images(pipe, tcs, monkeypatch):
    """Transcoders that return nothing leave nothing of the caption; the model itself gets some right."""
    monkeypatch.setattr(scored, "AT_ONCE", 4)
    tcs = tcs._replace(stacks=jax.tree.map(jnp.zeros_like, tcs.stacks))
    rows = accuracies(pipe, tcs, 4)
    assert rows[0]["right"] >= 2 and rows[1]["right"] == 0
