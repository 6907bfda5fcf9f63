"""What every feature of the organism detects, and where it is strongest, over thousands of captions.

1. Draw captions of one and two objects, with a noise seed each, and sample their images; every step's codes are made
   on the way. Captions that name a colour the object does not have are left out.
2. The scorer reads each image. Only those that show what was asked count for step 4, so that caption, reading and image
   agree on what is where.
3. Of every feature keep its strongest place in every image, and its code at a few random tokens of every step.
4. Each such token has known factors. Image token: the object that covers it (its shape, colour, place), whether one
   does, the relation in the caption, its row and column. Text token: its word, shape and colour of the object that its
   phrase names, the relation, its position.
5. A factor's value splits the tokens of a step in two; the AUROC of a feature is how often its code is larger at a
   token with the value than at one without, ties counting half. Value and step are chosen on the captions of even
   number; the AUROC that is reported is that of the odd ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.stats import rankdata

from difffract_jax.address import Group
from difffract_jax.circuits.notation.labels import EXAMPLES, FORMAT_VERSION
from difffract_jax.config import UserError
from difffract_jax.models import sampler
from difffract_jax.models.batch import pixels
from difffract_jax.models.blocks import Streams
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.stacks import sequences, streams
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.text import encode_all, tokenise
from difffract_jax.organism.world import Scenes, concatenate, scenes
from difffract_jax.storage.files import atomic_file
from difffract_jax.studies.evaluations import plain_run
from difffract_jax.studies.truth import KINDS, image_truth, text_truth
from difffract_jax.transcoders.codes import reduced_codes
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit

WORLD_SEED, FIRST_SEED = 70_000, 3_000_000
"""Seed of the captions, and noise seed of the first; neither training nor the scorer's tables use them."""
AT_ONCE = 100
"""Captions sampled together."""
IMAGE_TOKENS, TEXT_TOKENS = 12, 6
"""Random tokens of each side that are kept per caption and step."""
PLACED = ("position", "row", "column")
"""Factors of a token's own place in its sequence; the others are of content."""
FEWEST = 30
"""Tokens with a value that either half must hold for the value to be a candidate."""


class Kept(NamedTuple):
    """What is kept of one site's code.

    Attributes:
        largest: strongest value.
        position: where, in the site's sequence.
        active: tokens at which it is above 0, of those that count.
        code: by side, at the random tokens; float16 keeps their order, but for ties.
    """

    largest: Float[Any, "*runs feat"]
    position: Int[Any, "*runs feat"]
    active: Int[Any, "*runs feat"]
    code: dict[str, Float[Any, "*runs token feat"]]


def scan(
    pipe: Pipeline, tcs: TranscoderSet, captions: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Labels every feature of the organism's transcoders.

    Args:
        pipe: the organism.
        tcs: its transcoders, or SAEs.
        captions: how many to sample.
        progress: called with (captions done, captions in all).

    Returns:
        What `circuits.notation.labels` describes, without the record of how it was made.

    Raises:
        UserError: if the transcoders do not fit, there are too few captions, or the pipeline's guidance makes two
            evaluations a step.
    """
    check_fit(tcs, pipe.config.transformer)
    if captions < 2 * AT_ONCE or captions % AT_ONCE:
        raise UserError(f"A scan takes a multiple of {AT_ONCE} captions, at least {2 * AT_ONCE}, but got {captions}.")
    asked = _captions(captions)
    grid, parts, right, truths = plain_run(pipe).grid, [], [], []
    for first in range(0, captions, AT_ONCE):
        rows = np.arange(first, first + AT_ONCE)
        mine = asked.take(rows)
        kept, picked, images = _sample(pipe, tcs, mine, rows)
        reading = see(images)
        right.append(judge(mine, reading).right)
        truths.append(
            {
                "img": image_truth(mine, reading, grid, picked["img"]),
                "txt": text_truth(mine, picked["txt"]),
            }
        )
        parts.append(kept)
        if progress is not None:
            progress(first + AT_ONCE, captions)
    truth = {side: np.concatenate([one[side] for one in truths], axis=1) for side in ("img", "txt")}
    return _report(asked, parts, truth, np.concatenate(right), pipe, tcs)


def _captions(size: int) -> Scenes:
    found: list[Scenes] = []
    while sum(len(part.captions) for part in found) < size:
        drawn = scenes(WORLD_SEED, len(found), 512)
        used = np.arange(drawn.kind.shape[1]) < drawn.count[:, None]
        found.append(drawn.take(~((drawn.named >= 0) & (drawn.named != drawn.colour) & used).any(axis=1)))
    return concatenate(found).take(np.arange(size))


def _sample(
    pipe: Pipeline, tcs: TranscoderSet, asked: Scenes, numbers: np.ndarray
) -> tuple[dict[str, Kept], dict[str, np.ndarray], np.ndarray]:
    """Samples some captions: what is kept by group, the random tokens by side [step caption token], and the images."""
    run = pipe.plan()
    steps, img = run.steps, run.grid[0] * run.grid[1]
    text, pooled = encode_all(pipe.t5, pipe.clip, tokenise(pipe.tokenizers, asked.captions))
    channels = pipe.config.transformer.in_channels
    noise = jnp.stack([sampler.draw_noise(FIRST_SEED + int(number), run.grid, channels) for number in numbers])
    rng = np.random.default_rng((WORLD_SEED, int(numbers[0])))
    words = np.array([len(caption.split()) for caption in asked.captions])
    mask = np.arange(run.text_tokens) <= words[:, None]  # the closing token counts
    picked = {
        "img": rng.random((steps, len(words), img)).argsort(axis=2)[..., :IMAGE_TOKENS],
        "txt": rng.integers(0, words[None, :, None] + 1, (steps, len(words), TEXT_TOKENS)),
    }
    masks = np.broadcast_to(mask, (steps, *mask.shape))
    kept, latents = reduced_codes(pipe, tcs, run, text, pooled, noise, keep_code, (picked["img"], picked["txt"], masks))
    images = np.asarray(pixels(pipe.vae, latents, run.grid))
    return jax.tree.map(np.asarray, kept), picked, images


def keep_code(group: Group, z: Float[Array, "rows feat"], extra: tuple[Array, Array, Array]) -> Kept:
    """Reduces one site's code; a `transcoders.codes.Reduce`.

    Args:
        group: of the site.
        z: the code.
        extra: random image tokens, random text tokens, and which text tokens count.
    """
    *picked, mask = extra
    tokens = Streams(jnp.ones(z.shape[0] - (mask.shape[0] if "txt" in group.streams else 0), bool), mask)
    (counted,) = sequences(tokens, (group,), axis=0)
    counting = jnp.where(counted[:, None], z, 0)
    parts, chosen = streams((z,), (group,), tokens, axis=0), Streams(*picked)
    code = {stream: getattr(parts, stream)[getattr(chosen, stream)].astype(jnp.float16) for stream in group.streams}
    return Kept(counting.max(axis=0), counting.argmax(axis=0), (counting > 0).sum(axis=0), code)


def _report(
    asked: Scenes,
    parts: list[dict[str, Kept]],
    truth: dict[str, Bool[np.ndarray, "step caption token kind"]],
    right: Bool[np.ndarray, "caption"],
    pipe: Pipeline,
    tcs: TranscoderSet,
) -> dict[str, Any]:
    run = pipe.plan()
    tokens = {"img": run.tokens.img, "txt": float(np.mean([len(c.split()) + 1 for c in asked.captions]))}
    kinds = [[side, *kind] for side in KINDS for kind in KINDS[side]]
    sites, used = {}, set()
    for group, numbers in tcs.sites.members:
        rows = sum(tokens[stream] for stream in group.streams)
        for place, number in enumerate(numbers):
            columns = _site([_of_site(part[group.name], place) for part in parts], truth, right, rows)
            used |= {flat[i] for flat in columns["examples"] for i in range(0, len(flat), 4)}
            sites[f"{group.label}/{number}"] = columns
    order = {image: number for number, image in enumerate(sorted(used))}
    for columns in sites.values():
        for flat in columns["examples"]:
            flat[::4] = [order[image] for image in flat[::4]]
    return {
        "format_version": FORMAT_VERSION,
        "transcoders": tcs.source,
        "captions": len(right),
        "right": int(right.sum()),
        "text_tokens": run.text_tokens,
        "kinds": kinds,
        "images": [[asked.captions[image], FIRST_SEED + image] for image in order],
        "sites": sites,
    }


def _of_site(kept: Kept, place: int) -> Kept:
    return jax.tree.map(lambda a: a[:, :, place], kept)


def _site(
    parts: list[Kept], truth: dict[str, np.ndarray], right: Bool[np.ndarray, "caption"], rows: float | int
) -> dict[str, list[Any]]:
    """Returns the columns of one site, see `circuits.notation.labels`."""
    largest = np.concatenate([part.largest for part in parts], axis=1)
    position = np.concatenate([part.position for part in parts], axis=1)
    active = np.concatenate([part.active for part in parts], axis=1)
    steps, captions, features = largest.shape
    density = active.sum(axis=(0, 1)) / (largest.shape[0] * largest.shape[1] * rows)
    candidates, scores, held = _candidates(parts, truth, right)
    content = np.array([KINDS[side][kind][0] not in PLACED for side, kind, _ in candidates])
    columns: dict[str, list[Any]] = {}
    for prefix, usable in (("", scores), ("content_", np.where(content[:, None], scores, -1))):
        best = np.where(density > 0, usable.argmax(axis=0), -1)
        chosen = [candidates[number] if number >= 0 else ("", -1, 0) for number in best]
        columns[f"{prefix}kind"] = [_kind_number(side, kind) for side, kind, _ in chosen]
        columns[f"{prefix}step"] = [step for *_, step in chosen]
        columns[f"{prefix}auroc"] = [
            round(float(held[number, f]), 3) if number >= 0 else 0.5 for f, number in enumerate(best)
        ]
    columns["density"] = [float(f"{value:.2g}") for value in density]
    columns["examples"] = [_examples(largest[:, :, f], position[:, :, f]) for f in range(largest.shape[2])]
    return columns


def _kind_number(side: str, kind: int) -> int:
    """Returns a kind's number among those of both sides; -1 for none."""
    return kind if kind < 0 or side == "img" else kind + len(KINDS["img"])


def _candidates(
    parts: list[Kept], truth: dict[str, np.ndarray], right: Bool[np.ndarray, "caption"]
) -> tuple[list[tuple[str, int, int]], Float[np.ndarray, "candidate feat"], Float[np.ndarray, "candidate feat"]]:
    """Returns side, kind and step of all candidates, their AUROCs on even captions, -1 if too few, and on odd ones."""
    names, scores, held = [], [], []
    even = np.arange(len(right)) % 2 == 0
    for side in parts[0].code:
        code = np.concatenate([part.code[side] for part in parts], axis=1)
        for step, (z, known) in enumerate(zip(code, truth[side], strict=True)):
            halves = [
                auroc(z[mask].reshape(-1, z.shape[-1]), known[mask].reshape(-1, known.shape[-1]))
                for mask in (right & even, right & ~even)
            ]
            names += [(side, kind, step) for kind in range(len(KINDS[side]))]
            scores.append(np.where(np.isfinite(halves[0] + halves[1]), halves[0], -1))
            held.append(halves[1])
    return names, np.concatenate(scores), np.concatenate(held)


def auroc(code: Float[np.ndarray, "row feat"], truth: Bool[np.ndarray, "row kind"]) -> Float[np.ndarray, "kind feat"]:
    """Returns how often a feature's code is larger at a row with a kind than at one without; ties count half.

    Args:
        code: codes.
        truth: whether a row is of a kind.

    Returns:
        AUROC in [0, 1]; NaN where fewer than `FEWEST` rows are, or are not, of the kind.
    """
    with_it = truth.sum(axis=0).astype(float)
    without = len(truth) - with_it
    ranks = rankdata(code, axis=0)
    above = truth.T.astype(float) @ ranks - (with_it * (with_it + 1) / 2)[:, None]
    enough = np.minimum(with_it, without) >= FEWEST
    pairs = np.where(enough, with_it * without, np.nan)
    return above / pairs[:, None]


def _examples(largest: Float[np.ndarray, "step caption"], position: Int[np.ndarray, "step caption"]) -> list[Any]:
    """Returns image, step, position and value of a feature's strongest images, in one flat list."""
    step = largest.argmax(axis=0)
    peak = largest.max(axis=0)
    found: list[Any] = []
    for image in np.argsort(-peak, kind="stable")[:EXAMPLES]:
        if peak[image] > 0:
            at = int(step[image])
            found += [int(image), at, int(position[at, image]), float(f"{peak[image]:.3g}")]
    return found


def write_labels(labels: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Writes a labels file.

    Args:
        labels: from `scan`.
        record: how they were made.
        path: file to write.
    """
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(labels | {"record": record}, separators=(",", ":")) + "\n", encoding="utf-8")
