"""Every model that the package takes, by its preset: diffusers' pipeline of it, small, and what converts it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import zimage
from diffusers import (
    ChromaPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

import chroma
import flux1
import klein
import sd3
from converters.chroma import CHROMA_DIFFUSERS, NUMBER, chroma_config_from_diffusers
from converters.flux import FLUX_DIFFUSERS, flux_config_from_diffusers
from converters.flux2 import FLUX2_DIFFUSERS, flux2_config_from_diffusers
from converters.mapping import check_coverage, source_shapes
from converters.sd3 import SD3_DIFFUSERS, sd3_config_from_diffusers, sd3_labels
from converters.zimage import ZIMAGE_DIFFUSERS, zimage_config_from_diffusers
from difffract_jax.models.chroma import ChromaMMDiT
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import Run
from difffract_jax.models.sampler import PATCH, pack, unpack
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.zimage import ZImageMMDiT
from difffract_jax.storage.checkpoint import leaf_paths

GRID = (3, 4)
"""Rows and columns of image tokens of the small pipelines' runs."""


def draw_text(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Draws a text embedding."""
    return rng.standard_normal((tokens, width)).astype(np.float32)


def mlps_of_two_streams(transformer: Any) -> list[tuple[str, Any, Any]]:
    """Returns the MLPs of blocks with two streams; a single-stream block has no module that gives its MLP's output."""
    streams = (("img", "ff"), ("txt", "ff_context"))
    found = [
        (f"{stream}/{number}", getattr(block, name))
        for number, block in enumerate(transformer.transformer_blocks)
        for stream, name in streams
    ]
    return [(site, module, module) for site, module in found if module is not None]


class Kind(NamedTuple):
    """A model, published and small.

    Attributes:
        published: the published configuration of its transformer.
        theirs: makes diffusers' module of the transformer of its configuration.
        read: makes our configuration of theirs.
        ours: our class.
        rules: the converter's table for diffusers' files.
        labels: names of stacks for the table, by our configuration; None where the table needs none.
        pipeline: makes diffusers' pipeline, small, with random weights.
        evaluate: runs its transformer once: module, latents, text, pooled, time, grid, guidance scale.
        text_tokens: of a small run.
        negative: negative prompt of a small run; None where there is no second branch.
        added: what keys end with that the converter adds to those of a checkpoint; None where it adds none.
        grid: rows and columns of image tokens of a small run.
        draw_text: draws a text for `evaluate`, from a generator, its length and its width.
        mlps: of diffusers' transformer, sites whose MLPs are modules: site, the module that reads x, the one that
            gives y.
    """

    published: Mapping[str, Any]
    theirs: Callable[..., torch.nn.Module]
    read: Callable[[Mapping[str, Any]], Any]
    ours: type[MMDiT]
    rules: Sequence[Any]
    labels: Callable[[Any], Any]
    pipeline: Callable[[], Any]
    evaluate: Callable[..., np.ndarray]
    text_tokens: int
    negative: str | None = None
    added: str | None = None
    grid: tuple[int, int] = GRID
    draw_text: Callable[[np.random.Generator, int, int], np.ndarray] = draw_text
    mlps: Callable[[Any], list[tuple[str, Any, Any]]] = mlps_of_two_streams


def _flux1(name: str) -> Kind:
    converter = (FluxTransformer2DModel, flux_config_from_diffusers, MMDiT, FLUX_DIFFUSERS, lambda config: None)
    return Kind(flux1.PUBLISHED[name], *converter, partial(flux1.tiny_pipeline, name), flux1.run_theirs, 16)


def _klein(*, distilled: bool) -> Kind:
    converter = (Flux2Transformer2DModel, flux2_config_from_diffusers, Flux2MMDiT, FLUX2_DIFFUSERS, lambda config: None)
    # The pipeline takes a negative prompt as embeddings alone, and the empty one by itself.
    negative = None if distilled else ""

    def evaluate(module: Any, latents: np.ndarray, text: np.ndarray, pooled: Any, t: float, grid: Any, guidance: Any):
        del pooled, guidance  # FLUX.2 takes neither
        return klein.run_theirs(module, latents, text, t, grid)

    return Kind(klein.PUBLISHED, *converter, partial(klein.tiny_pipeline, distilled), evaluate, 64, negative)


def _sd3(name: str) -> Kind:
    converter = (SD3Transformer2DModel, sd3_config_from_diffusers, Sd3MMDiT, SD3_DIFFUSERS, sd3_labels)

    def evaluate(module: Any, *given: Any) -> np.ndarray:
        return sd3.run_theirs(module, *given[:-1])  # no guidance scale is fed

    tokens = sd3.CLIP_LENGTH + 20
    return Kind(sd3.PUBLISHED[name], *converter, partial(sd3.tiny_pipeline, name), evaluate, tokens, "a dog")


def _chroma() -> Kind:
    def theirs(**config: Any) -> torch.nn.Module:
        return chroma.their_transformer(config)

    def evaluate(module: Any, latents: np.ndarray, text: np.ndarray, pooled: Any, t: float, grid: Any, guidance: Any):
        del pooled, guidance  # Chroma takes neither
        return chroma.run_theirs(module, latents, text, t, grid, np.any(text != 0, axis=-1))

    converter = (theirs, chroma_config_from_diffusers, ChromaMMDiT, CHROMA_DIFFUSERS, lambda config: None)
    small = partial(chroma.tiny_pipeline, use_beta_sigmas=True)
    return Kind(chroma.PUBLISHED, *converter, small, evaluate, 20, "a dog", NUMBER)


def _zimage() -> Kind:
    def evaluate(module: Any, latents: np.ndarray, text: np.ndarray, pooled: Any, t: float, grid: Any, guidance: Any):
        del pooled, guidance  # Z-Image takes neither
        return zimage.run_theirs(module, latents, text, t, grid)

    converter = (ZImageTransformer2DModel, zimage_config_from_diffusers, ZImageMMDiT, ZIMAGE_DIFFUSERS)
    small = {"grid": zimage.GRID, "draw_text": zimage.draw_text, "mlps": zimage.mlps}
    published = zimage.PUBLISHED
    return Kind(published, *converter, lambda config: None, zimage.tiny_pipeline, evaluate, 64, **small)


KINDS = {
    "flux-schnell": _flux1("flux-schnell"),
    "flux-dev": _flux1("flux-dev"),
    "flux2-klein": _klein(distilled=True),
    "flux2-klein-base": _klein(distilled=False),
    "sd3-medium": _sd3("sd3-medium"),
    "sd3.5-medium": _sd3("sd3.5-medium"),
    "sd3.5-large": _sd3("sd3.5-large"),
    "chroma1-hd": _chroma(),
    "z-image-turbo": _zimage(),
}


class Coverage(NamedTuple):
    """What a converter's table makes of a published transformer.

    Attributes:
        problems: keys that are not used or not there, and shapes that differ; none if the table fits.
        same: whether the keys and shapes that it would write back are those of diffusers' module, without what it adds.
        tensors: of diffusers' module.
        numbers: in these, and in our leaves, without what it adds.
    """

    problems: list[str]
    same: bool
    tensors: int
    numbers: tuple[int, int]


def coverage(kind: Kind) -> Coverage:
    """Compares the table with diffusers' module of the published size, without weights."""
    with torch.device("meta"):
        module = kind.theirs(**kind.published)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    config = kind.read(kind.published)
    abstract, labels = abstract_module(kind.ours, config), kind.labels(config)
    ours = sum(int(np.prod(leaf.shape)) for leaf in leaf_paths(abstract).values())
    wanted = source_shapes(kind.rules, abstract, labels)
    added = {key: wanted.pop(key) for key in [*wanted] if kind.added is not None and key.endswith(kind.added)}
    return Coverage(
        check_coverage(shapes | added, kind.rules, abstract, labels=labels),
        wanted == shapes,
        len(shapes),
        (_numbers(shapes), ours - _numbers(added)),
    )


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def small_run(pipe: Pipeline, kind: Kind, steps: int | None = None) -> Run:
    """Plans a run of the small pipeline, with the model's own guidance, and its own steps unless they are given."""
    side = PATCH * pipe.config.vae.factor
    sizes = {"height": side * kind.grid[0], "width": side * kind.grid[1], "text_tokens": kind.text_tokens}
    negative = {} if kind.negative is None else {"negative_prompt": kind.negative}
    return pipe.plan(**sizes | negative, steps=steps)


class TheirRun(NamedTuple):
    """What diffusers' pipeline made.

    Attributes:
        pixels: of the image, [H W rgb], from 0 to 1.
        latents: packed, after the last step.
        times: fed to the model, over 1000.
    """

    pixels: np.ndarray
    latents: np.ndarray
    times: list[float]


def run_theirs(pipe: Any, run: Run, prompt: str, noise: np.ndarray) -> TheirRun:
    """Runs diffusers' pipeline from packed noise as the run says, in the type of its weights.

    Chroma's makes masks of floating point numbers, which do not hide padding: it is given boolean ones.
    """
    if isinstance(pipe, ZImagePipeline):
        return TheirRun(*zimage.run_pipeline(pipe, prompt, noise, run.grid, run.steps, run.text_tokens))
    pipe.set_progress_bar_config(disable=True)
    spatial, seen = isinstance(pipe.transformer, SD3Transformer2DModel), {"times": []}

    def keep(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen["times"].append(float(t) / 1000)
        seen["latents"] = values["latents"][0].float().numpy()
        return values

    given: dict[str, Any] = {"max_sequence_length": run.text_tokens}
    if run.guidance is not None:
        given["guidance_scale"] = run.guidance
    if spatial:
        latents = torch.tensor(np.array(unpack(jnp.asarray(noise), run.grid)).transpose(2, 0, 1))[None]
        given |= {"max_sequence_length": run.text_tokens - sd3.CLIP_LENGTH, "negative_prompt": run.negative_prompt}
    elif isinstance(pipe.transformer, Flux2Transformer2DModel):
        latents = torch.tensor(noise).T.reshape(1, noise.shape[1], *run.grid)
    else:
        latents = torch.tensor(noise)[None]
    if isinstance(pipe, ChromaPipeline):
        given |= _encoded(pipe, prompt, run)
    else:
        given["prompt"] = prompt
    side = PATCH * pipe.vae_scale_factor
    pixels = pipe(
        latents=latents.to(next(pipe.transformer.parameters()).dtype),
        height=side * run.grid[0],
        width=side * run.grid[1],
        num_inference_steps=run.steps,
        output_type="np",
        callback_on_step_end=keep,
        **given,
    ).images[0]
    made = seen["latents"]
    return TheirRun(pixels, np.asarray(pack(made.transpose(1, 2, 0))) if spatial else made, seen["times"])


def _encoded(pipe: Any, prompt: str, run: Run) -> dict[str, Any]:
    """Returns the embeddings of both prompts by Chroma's pipeline, and which of their tokens are seen."""
    with torch.no_grad():
        text, _, mask, negative, _, negative_mask = pipe.encode_prompt(
            prompt, run.negative_prompt, max_sequence_length=run.text_tokens
        )
    return {
        "prompt_embeds": text,
        "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask.bool(),
    }


def draw_noise(pipe: Pipeline, kind: Kind, seed: int = 0) -> np.ndarray:
    """Returns packed starting noise of a small run."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((kind.grid[0] * kind.grid[1], pipe.config.transformer.in_channels)).astype(np.float32)


def watch_mlps(pipe: Any, kind: Kind) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Lets diffusers' pipeline report what enters and leaves the MLPs that are modules of its blocks.

    Returns:
        Site, as in "img/0", to pairs of rows; filled by every run from now on.
    """
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def rows(tensor: Any) -> np.ndarray:
        return tensor.detach().reshape(-1, tensor.shape[-1]).numpy()

    for site, reads, gives in kind.mlps(pipe.transformer):
        pairs, entered = seen.setdefault(site, []), []

        def enter(_: Any, given: Any, entered: list[Any] = entered) -> None:
            entered.append(rows(given[0]))

        def leave(_: Any, given: Any, made: Any, pairs: list[Any] = pairs, entered: list[Any] = entered) -> None:
            pairs.append((entered.pop(), rows(made)))

        reads.register_forward_pre_hook(enter)
        gives.register_forward_hook(leave)
    return seen
