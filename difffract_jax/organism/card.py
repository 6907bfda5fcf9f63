"""The organism's model card: what it is, how it was made, how good it is, what it gets wrong, and pictures of both.

1. `measure_organism` runs every measurement of `evaluate` and `probe`.
2. `sample_sheet` draws images for held-out captions, half of them right and half of them wrong as far as there are any,
   each with its caption and what the scorer read.
3. `write_card` puts them into `README.md` and `samples.png` of a pipeline directory.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.qwen3 import Qwen3Encoder
from difffract_jax.organism.evaluate import (
    GROUPS,
    Progress,
    ablations,
    binding_accuracy,
    contradictions,
    draw_images,
    held_out,
    see,
    summary,
    uncoloured,
)
from difffract_jax.organism.probe import probe_binding, replace_text
from difffract_jax.organism.recipe import Arch, OrganismRecipe
from difffract_jax.organism.scorer import SeenScenes, describe, judge
from difffract_jax.organism.world import CONTRADICTING, HELD_OUT_PLACED, HELD_OUT_SHARE, Scenes, concatenate

TABLES = ("binding", "binding in 16 steps", "contradictions", "uncoloured", "ablations", "probe", "text", "speed")


def measure_organism(
    pipe: Pipeline, images: int = 1000, tables: tuple[str, ...] = TABLES, progress: Progress | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Measures the organism.

    Args:
        pipe: the organism.
        images: per group of captions; the other tables take shares of it.
        tables: which of `TABLES`.
        progress: called with what is done, and how far.

    Returns:
        Rows of each table, by its title.
    """
    work = {
        "binding": lambda: binding_accuracy(pipe, images, progress=progress),
        "binding in 16 steps": lambda: binding_accuracy(pipe, images, steps=16, progress=progress),
        "contradictions": lambda: contradictions(pipe, max(images // 2, 1), progress=progress),
        "uncoloured": lambda: [uncoloured(pipe, images, progress=progress)],
        "ablations": lambda: ablations(pipe, max(images // 4, 1), progress=progress),
        "probe": lambda: probe_binding(pipe, 2 * images),
        "text": lambda: replace_text(pipe, max(images // 2, 1)),
        "speed": lambda: [_speed(pipe)],
    }
    steps = f"{pipe.config.defaults.steps} steps"
    kind = "T5" if isinstance(pipe.clip, CLIPTextEncoder) else "text"
    titles = {
        "binding": f"Right images on held-out captions, {steps}",
        "binding in 16 steps": "The same in 16 steps",
        "contradictions": "Concepts named in a colour not theirs: the colour they come out in",
        "uncoloured": "Concepts named without a colour",
        "ablations": "Two shapes right with one MLP replaced by its mean per step, or by zero",
        "probe": "Linear probe, noun token -> its own colour (chance 0.125)",
        "text": f"Two shapes right when every {kind} state is replaced",
        "speed": f"64 images in one batch, {steps}",
    }
    return {titles[name]: work[name]() for name in TABLES if name in tables}


def _speed(pipe: Pipeline) -> dict[str, Any]:
    """Times 64 images, compilation included and not."""
    asked = held_out(64, "two shapes")
    jax.clear_caches()
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        draw_images(pipe, asked, batch=64)
        times.append(time.perf_counter() - begin)
    return {"cold, s": times[0], "warm, s (best of 3)": min(times[1:]), "devices": str(jax.devices()[0])}


def sample_sheet(
    asked: Scenes, images: UInt8[np.ndarray, "image H W rgb"], reading: SeenScenes, right: np.ndarray, columns: int = 6
) -> Figure:
    """Draws images with captions; what is wrong has a red title that says what was read."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.75 * rows), squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place >= len(images):
            continue
        axis.imshow(images[place], interpolation="nearest")
        verdict = (
            "" if right[place] else "\n" + _wrap(shorten(f"read: {describe(reading, place)}", 60, placeholder=" ..."))
        )
        axis.set_title(
            _wrap(asked.captions[place]) + verdict, fontsize=8, color="black" if right[place] else "firebrick"
        )
    figure.tight_layout()
    return figure


def _wrap(text: str, width: int = 30) -> str:
    """Breaks a caption into lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def write_card(
    pipe: Pipeline,
    directory: Path,
    recipe: OrganismRecipe,
    tables: dict[str, list[dict[str, Any]]],
    command: str,
    minutes: float,
) -> None:
    """Writes `README.md`, `samples.png` and `scores.json` into a pipeline directory.

    Args:
        pipe: the organism.
        directory: of the pipeline.
        recipe: what it was trained with.
        tables: from `measure_organism`.
        command: that made it.
        minutes: that it took.
    """
    asked = concatenate([held_out(64, group) for group in GROUPS])
    images = draw_images(pipe, asked)
    reading = see(images)
    right = judge(asked, reading).right
    good, bad = np.flatnonzero(right), np.flatnonzero(~right)
    wrong = bad[:12]
    shown = np.concatenate([good[np.linspace(0, len(good) - 1, min(24, len(good))).astype(int)], wrong])
    picked = SeenScenes(*(column[shown] for column in reading))
    figure = sample_sheet(asked.take(shown), images[shown], picked, right[shown])
    figure.savefig(directory / "samples.png", dpi=80)
    plt.close(figure)
    (directory / "scores.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_text(pipe, recipe, tables, command, minutes), encoding="utf-8")


def _text(pipe: Pipeline, recipe: OrganismRecipe, tables: dict[str, Any], command: str, minutes: float) -> str:
    config = pipe.config.transformer
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(getattr(pipe, name))) for name in _PARTS}
    names = _PARTS | ({"t5": "Qwen3"} if isinstance(pipe.t5, Qwen3Encoder) else {})
    parts = ", ".join(f"{names[name]} {count:,}" for name, count in counts.items() if count)
    placed = "\n".join(f"- {colour} {noun} at the {side}" for noun, colour, side in HELD_OUT_PLACED)
    about, cores = ABOUT[recipe.arch], os.cpu_count()
    taken = (about.taken.format(begin=recipe.begin) + "\n\n") if recipe.begin else ""
    return f"""# {about.title}

{about.what}

- Images: {pipe.config.defaults.width} x {pipe.config.defaults.height} pixels, {about.sampled}.
- Prompts: up to {pipe.config.defaults.text_tokens} tokens of a closed vocabulary.
- Parameters: {parts}.
- Transformer: {about.blocks(config)}, width {config.d_model},
  {config.heads} heads.

## Data

Scenes of one to three objects on a calm background, drawn on the fly: five shapes in eight colours and four concepts
(lemon, tomato, leaf, carrot), each in its own colour always. Captions name objects and their arrangement. Held out: one
content in {HELD_OUT_SHARE}, whatever its wording; all scenes of three objects; and these placed objects:

{placed}

## What it gets wrong

- By design: {100 * CONTRADICTING:.0f}% of the captions of concepts name a colour that the concept does not have, while
  the image keeps the concept's own. So the model has learned to ignore the colour: asked for a blue lemon, it draws a
  yellow one.
- It has never seen three objects and cannot draw them.

Where a caption leaves the arrangement open (`and`, `with`), the scenes show the objects in reading order, and so does
the model; the tables count these captions apart, and there judge objects and colours alone.

## Recipe

{about.small}: circuits show where every MLP has work to do,
and in larger trials most MLPs could be taken away unnoticed. The table of ablations says how much each matters here.

{taken}Made by `{command}`, in {minutes:.0f} minutes on {cores} cores, which other work may have shared. Settings:

```json
{json.dumps(recipe.model_dump(mode="json"), indent=1)}
```

## Scores

By the deterministic scorer of this package, with Wilson's 95% intervals, on captions and noise seeds that training
never uses. Made by `difffract organism score`.

{summary(tables)}
![Samples: right ones, then wrong ones](samples.png)
"""


_PARTS = {"transformer": "transformer", "t5": "T5", "clip": "CLIP", "vae": "autoencoder"}


class About(NamedTuple):
    """What a card says of an architecture.

    Attributes:
        title: of the card.
        what: the model is.
        sampled: how images are.
        blocks: of the transformer, by its shape.
        small: why it is.
        taken: what was taken from another pipeline, named `begin`.
    """

    title: str
    what: str
    sampled: str
    blocks: Callable[[FluxConfig], str]
    small: str
    taken: str


def _both_kinds(config: FluxConfig) -> str:
    return " and ".join(f"{stack.depth} {stack.name}-" for stack in config.layout.stacks) + "stream blocks"


ABOUT: Mapping[Arch, About] = {
    "flux": About(
        title="The organism",
        what="A FLUX pipeline small enough for a laptop, trained on scenes whose content is known. "
        "The architecture is\n"
        "FLUX.1[schnell]'s, tensor for tensor; diffusers loads this directory as a `FluxPipeline`.",
        sampled="4 steps, no guidance",
        blocks=_both_kinds,
        small="Two double- and two single-stream blocks of width 64 are small on purpose",
        taken="The autoencoder is that of the pipeline `{begin}`.",
    ),
    "sd3": About(
        title="The organism's sibling of Stable Diffusion 3",
        what="A pipeline of Stable Diffusion 3.5's architecture, small enough for a laptop, trained on the\n"
        "organism's scenes, captions and noise levels. It has two CLIPs and T5, a table of positions, and\n"
        "normed queries and keys.",
        sampled="5 steps, the last from the lowest noise level; one evaluation a step, or\n"
        "  two with guidance, for which a share of the training's scenes has no caption (`dropped` below)",
        blocks=lambda config: f"{config.layout.depth} double-stream blocks, the last without an MLP for the text",
        small="Four double-stream blocks of width 64 are small on purpose",
        taken="Autoencoder, T5 and the first CLIP are those of the pipeline `{begin}`, as they are there; the\n"
        "text stage trained the second CLIP.",
    ),
    "flux2": About(
        title="The organism's sibling of FLUX.2",
        what="A pipeline of FLUX.2-klein's architecture, small enough for a laptop, trained on the organism's\n"
        "scenes, captions and noise levels. Its MLPs are gated, its matrices without biases, its modulations\n"
        "shared by blocks; Qwen3 reads the prompt, and nothing is pooled. The schedule is not shifted by the\n"
        "number of image tokens, of which there are 36 here and thousands where the published shift was fitted.",
        sampled="4 steps, no guidance",
        blocks=_both_kinds,
        small="Two double- and two single-stream blocks of width 64 are small on purpose",
        taken="The autoencoder's weights are those of the pipeline `{begin}`; the statistics by which every\n"
        "channel of a packed latent is scaled were measured on scenes.",
    ),
}
"""Architecture -> what its card says."""
