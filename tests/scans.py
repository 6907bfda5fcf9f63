"""A small corpus to scan: the random pipeline, a few prompts, and its codes as `capture` records them."""

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.address import BRANCHES
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.transcoder import TranscoderSet
from traces import guided_pipeline, make_transcoders

PROMPTS = ("a red fox", "two foxes", "a tin robot", "fog", "a blue lemon", "an owl", "green tea")
SEED, TOP = 11, 3
SITES = ("img/0", "img/1", "img/2", "single/0", "single/1", "txt/0", "txt/1", "txt/2")
"""Names of all sites, sorted, so that tests can be collected without making the corpus."""


class Small(NamedTuple):
    """A corpus, transcoders, and the codes of its sites, [prompt evaluation row feat], 0 where tokens do not count."""

    corpus: Corpus
    tcs: TranscoderSet
    codes: dict[str, np.ndarray]


AWAY = "a dark owl in fog"
"""Negative prompt of the corpus with guidance."""


@cache
def small() -> Small:
    """Returns the corpus, made once for all tests; one feature of every site never fires."""
    pipe = random_pipeline()
    tcs = make_transcoders(pipe.config.transformer, joint=(0, 1), dtype=jnp.float32)
    for stack in tcs.stacks.values():
        stack.enc.bias[...] = stack.enc.bias[...].at[:, 7].set(-1e6)
    run = pipe.plan(height=16, width=24, text_tokens=16, steps=2)
    corpus = Corpus(pipe, run, PROMPTS, SEED, 3)
    assert sorted(tcs.sites.names) == list(SITES)
    return Small(corpus, tcs, _codes(corpus, tcs))


@cache
def guided_small() -> Small:
    """Returns a corpus with guidance by two branches, of fewer prompts and sites."""
    pipe = guided_pipeline()
    tcs = make_transcoders(pipe.config.transformer, img=(0,), txt=(1,), joint=(0,), dtype=jnp.float32)
    run = pipe.plan(height=16, width=24, text_tokens=16, steps=2, guidance=3.0, negative_prompt=AWAY)
    corpus = Corpus(pipe, run, PROMPTS[:3], SEED, 2)
    return Small(corpus, tcs, _codes(corpus, tcs))


def _codes(corpus: Corpus, tcs: TranscoderSet) -> dict[str, np.ndarray]:
    """Returns the codes of recorded runs, each evaluation of each prompt by itself."""
    found: dict[str, list[Any]] = {name: [] for name in tcs.sites.names}
    for number, prompt in enumerate(corpus.prompts):
        by_step: dict[str, list[Any]] = {name: [] for name in found}
        for step, branch in product(range(corpus.run.steps), BRANCHES[: corpus.run.branches]):
            given = {"seed": SEED + number, "step": step, "run": corpus.run, "branch": branch}
            record = capture(corpus.pipe, tcs, prompt, **given).record
            for group, (one, numbers) in enumerate(tcs.sites.members):
                for slot, site in enumerate(numbers):
                    tc = jax.tree.map(lambda leaf, slot=slot, one=one: leaf[slot], tcs.stacks[one.name])
                    z = tc.encode(record.mlp_in[group][site], record.t)
                    by_step[f"{one.label}/{site}"].append(
                        np.asarray(z) * np.asarray(record.replaceable[group])[:, None]
                    )
        for name, steps in by_step.items():
            found[name].append(np.stack(steps))
    return {name: np.stack(prompts) for name, prompts in found.items()}


def places(small: Small) -> dict[str, tuple[str, int]]:
    """Returns group and place there of every site, by name."""
    return {
        f"{group.label}/{number}": (group.name, slot)
        for group, numbers in small.tcs.sites.members
        for slot, number in enumerate(numbers)
    }
