"""How well the organism's images follow their captions, counted by the scorer, with 95% intervals.

1. `binding_accuracy`: on contents held out of training, the share of images that show exactly the objects asked for,
   each in its colour, placed as the caption says; by number of objects, and with and without concepts.
2. `contradictions`: concepts named in a colour that is not theirs. In which colour do they come out?
3. `uncoloured`: concepts named without a colour. Do they come out in their prior's?
4. `ablations`: two-object binding with one MLP at a time replaced by its mean per step, or by zero
   (docs/method.md, section 9).

Scenes come from a seed of their own and noise from seeds counted from `FIRST_SEED`; training uses neither.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from difffract_jax.models import sampler
from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import Pipeline, negative_branch
from difffract_jax.organism.ablation import ablated_velocity, ablation, mean_outputs, sites
from difffract_jax.organism.captions import RELATIONS
from difffract_jax.organism.scorer import SeenScenes, interval, judge, read_scenes
from difffract_jax.organism.text import encode_all, tokenise
from difffract_jax.organism.world import IS_CONCEPT, PRIOR, Scenes, concatenate, scenes

WORLD_SEED = 20_000
"""Seed of the scenes; training derives its own from `numpy.random.SeedSequence`."""
FIRST_SEED = 1_000_000
"""Noise seed of the first image."""
GROUPS = ("one object", "two shapes", "two with a concept", "two, arrangement left open", "three objects")
"""Kinds of captions that are counted apart. Those of the second and third name a relation between the two objects."""
Progress = Callable[[str, int, int], None]


def held_out(size: int, group: str, seed: int = WORLD_SEED) -> Scenes:
    """Returns held-out scenes of one group, none of which names a contradicting colour.

    Args:
        size: how many.
        group: one of `GROUPS`.
        seed: of the scenes.
    """
    counts = {"one object": (1,), "three objects": (3,)}.get(group, (2,))
    found: list[Scenes] = []
    batch = 0
    while sum(len(part.captions) for part in found) < size:
        drawn = scenes(seed, batch, 512, "held out", counts)
        used = np.arange(drawn.kind.shape[1]) < drawn.count[:, None]
        concept = (IS_CONCEPT[drawn.kind] & used).any(axis=1)
        honest = ~((drawn.named >= 0) & (drawn.named != drawn.colour) & used).any(axis=1)
        open_ = (drawn.count == 2) & (drawn.arrangement == RELATIONS.index("and"))
        wanted = {
            "two shapes": ~concept & ~open_,
            "two with a concept": concept & ~open_,
            "two, arrangement left open": open_,
        }.get(group, True)
        found.append(drawn.take(honest & wanted))
        batch += 1
    return concatenate(found).take(np.arange(size))


def draw_images(pipe: Pipeline, asked: Scenes, **options: Any) -> UInt8[np.ndarray, "image H W rgb"]:
    """Generates one image per scene, each from a noise seed of its own; options as in `generate_batch`."""
    seeds = range(FIRST_SEED, FIRST_SEED + len(asked.captions))
    return generate_batch(pipe, asked.captions, seeds, **options)


def see(images: UInt8[np.ndarray, "image H W rgb"]) -> SeenScenes:
    """Reads generated images."""
    return read_scenes(images.astype(np.float32) / 255)


def share(name: str, right: int, total: int) -> dict[str, Any]:
    """Returns one row of a table: a count, its share, and the share's interval."""
    low, high = interval(right, total)
    return {"what": name, "images": total, "right": right, "share": right / total, "95% from": low, "to": high}


def binding_accuracy(
    pipe: Pipeline, size: int, *, steps: int | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Returns the shares of right images on held-out captions.

    Args:
        pipe: the organism.
        size: images per group.
        steps: denoising steps; the pipeline's default if left out.
        progress: called with what is drawn, images done, images in all.
    """
    rows = []
    for group in GROUPS:
        asked = held_out(size, group)
        images = draw_images(pipe, asked, steps=steps, progress=_named(progress, group))
        rows.append(share(group, int(judge(asked, see(images)).right.sum()), size))
    return rows


def contradictions(pipe: Pipeline, size: int, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Returns in which colours concepts come out that are named in a colour not theirs.

    Args:
        pipe: the organism.
        size: prompts; half name the concept alone, half beside another object.
        progress: as in `binding_accuracy`.
    """
    asked = contradicting(size)
    seen = see(draw_images(pipe, asked, progress=_named(progress, "contradictions")))
    verdicts = [_colour_verdict(asked, seen, row) for row in range(size)]
    return [share(verdict, verdicts.count(verdict), size) for verdict in ("prior", "asked", "other", "unreadable")]


def contradicting(size: int, seed: int = WORLD_SEED + 1) -> Scenes:
    """Returns scenes whose captions name a concept in a colour not its own, alone or first of two.

    Args:
        size: how many.
        seed: of the scenes.
    """
    found: list[Scenes] = []
    batch = 0
    while sum(len(part.captions) for part in found) < size:
        drawn = scenes(seed, batch, 4096, "train", (1, 2))
        first = IS_CONCEPT[drawn.kind[:, 0]] & (drawn.named[:, 0] >= 0) & (drawn.named[:, 0] != drawn.colour[:, 0])
        twin = (drawn.count == 2) & (drawn.kind[:, 1] == drawn.kind[:, 0])
        found.append(drawn.take(first & ~twin))
        batch += 1
    return concatenate(found).take(np.arange(size))


def _colour_verdict(asked: Scenes, seen: SeenScenes, row: int) -> str:
    """Says in which colour the first object of a caption came out."""
    at = np.flatnonzero(seen.kind[row, : seen.count[row]] == asked.kind[row, 0])
    if len(at) != 1 or seen.colour[row, at[0]] < 0:
        return "unreadable"
    colour = int(seen.colour[row, at[0]])
    return {int(asked.colour[row, 0]): "prior", int(asked.named[row, 0]): "asked"}.get(colour, "other")


def uncoloured(pipe: Pipeline, size: int, *, progress: Progress | None = None) -> dict[str, Any]:
    """Returns how often concepts named without a colour come out in their prior's; held-out contents."""
    found: list[Scenes] = []
    batch = 0
    while sum(len(part.captions) for part in found) < size:
        drawn = scenes(WORLD_SEED + 2, batch, 512, "held out", (1, 2))
        twin = (drawn.count == 2) & (drawn.kind[:, 1] == drawn.kind[:, 0])
        found.append(drawn.take(IS_CONCEPT[drawn.kind[:, 0]] & (drawn.named[:, 0] < 0) & ~twin))
        batch += 1
    asked = concatenate(found).take(np.arange(size))
    seen = see(draw_images(pipe, asked, progress=_named(progress, "uncoloured concepts")))
    right = [
        bool(np.any((seen.kind[row] == kind) & (seen.colour[row] == PRIOR[kind])))
        for row, kind in enumerate(asked.kind[:, 0])
    ]
    return share("uncoloured concepts in their prior's colour", sum(right), size)


def ablations(pipe: Pipeline, size: int, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Returns two-object binding with one MLP at a time ablated, by its mean and by zero.

    Args:
        pipe: the organism.
        size: images per ablation; the same captions and seeds for all.
        progress: as in `binding_accuracy`.
    """
    asked = held_out(size, "two shapes")
    config, run = pipe.config.transformer, pipe.plan()
    calibration = scenes(WORLD_SEED + 3, 0, 256)
    text, pooled = encode_all(pipe.t5, pipe.clip, tokenise(pipe.tokenizers, calibration.captions))
    noise = jnp.stack([sampler.draw_noise(seed, run.grid, config.in_channels) for seed in range(256)])
    mean = mean_outputs(pipe.transformer, run, text, pooled, noise, negative_branch(pipe, run, noise.dtype))
    zero = jax.tree.map(jnp.zeros_like, mean)

    def right(site: tuple[int, int] | None, value: Any, label: str) -> float:
        params = (pipe.transformer, ablation(config, site, value))
        images = draw_images(
            pipe, asked, velocity=ablated_velocity, params=params, progress=_named(progress, f"ablating {label}")
        )
        return float(judge(asked, see(images)).right.mean())

    whole = right(None, mean, "nothing")
    rows = []
    for group, layer in sites(config):
        name = f"{config.layout.groups[group].label}/{layer}"
        shares = {kind: right((group, layer), value, name) for kind, value in (("mean", mean), ("zero", zero))}
        rows.append(
            {"site": name, "images": size, "whole": whole} | shares | {"points lost": 100 * (whole - shares["mean"])}
        )
    return rows


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def summary(tables: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns tables as Markdown."""
    lines: list[str] = []
    for title, rows in tables.items():
        if not rows:
            lines += [f"### {title}", "", "Nothing.", ""]
            continue
        header = list(rows[0])
        lines += [f"### {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(_cell(value) for value in row.values())} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
