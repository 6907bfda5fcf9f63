"""What became of many edited images at once, and how sure one can be of the difference between two ways to edit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import stats

from difffract_jax.circuits.editing.sweeps import AT_ONCE, steer_batch
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.scorer import interval
from difffract_jax.studies.cases import Material
from difffract_jax.studies.metrics import distances, intent, precision_recall, score_edits
from difffract_jax.transcoders.transcoder import TranscoderSet

RESAMPLES = 10_000
"""Of the bootstrap."""
Progress = Callable[[int, int], None]


class Outcomes(NamedTuple):
    """What edits did, one entry per case.

    Attributes:
        success: the image shows what was wanted: every object with its noun and colour, placed as asked.
        others: an object that was not meant to change did; success rules out that it has another noun or colour.
        flipped: attributes changed that were not meant to.
        meant: attributes that were to change, and are named.
        reached: those of them that are as wanted.
        changed: attributes that changed, but for those that were left open.
        compared: whether the unedited image shows what it was taken to show, so that the five above mean something.
        outside: root mean square change of the pixels that are surely not the object's, in pixels of [0, 1].
        psnr: of the same, in dB.
        norm: size of the edits.
        images: the edited images.
    """

    success: Bool[np.ndarray, "case"]
    others: Bool[np.ndarray, "case"]
    flipped: Float[np.ndarray, "case"]
    meant: Float[np.ndarray, "case"]
    reached: Float[np.ndarray, "case"]
    changed: Float[np.ndarray, "case"]
    compared: Bool[np.ndarray, "case"]
    outside: Float[np.ndarray, "case"]
    psnr: Float[np.ndarray, "case"]
    norm: Float[np.ndarray, "case"]
    images: UInt8[np.ndarray, "case H W rgb"]


def outcomes(
    pipe: Pipeline,
    tcs: TranscoderSet,
    material: Material,
    edits: Sequence[Sequence[Edit]],
    progress: Progress | None = None,
) -> list[Outcomes]:
    """Edits every case in several ways and reads what comes out.

    Args:
        pipe: the organism.
        tcs: whose features the edits name.
        material: the cases.
        edits: way after way, the edits of every case; as many as ways times cases.
        progress: called with (images done, images in all).

    Returns:
        One entry per way.
    """
    cases, ways = material.cases, len(edits) // len(material.cases)
    made = steer_batch(
        pipe,
        tcs,
        [case.prompt for case in cases] * ways,
        edits,
        [case.seed for case in cases] * ways,
        batch=AT_ONCE,
        progress=progress,
    )
    found = []
    for way in range(ways):
        rows = slice(way * len(cases), (way + 1) * len(cases))
        found.append(judged(material, made.images[rows], made.norms[rows]))
    return found


def judged(material: Material, images: UInt8[np.ndarray, "case H W rgb"], norms: Float[np.ndarray, "case"]) -> Outcomes:
    """Reads edited images of all cases, each beside its original.

    Args:
        material: the cases.
        images: edited.
        norms: size of each one's edits.
    """
    shown = [case.shows or case.prompt for case in material.cases]
    meant = [intent(before, case.wanted) for before, case in zip(shown, material.cases, strict=True)]
    read = score_edits(shown, meant, material.images, images)
    far = [
        distances(original[None], edited[None], ~outside)
        for original, edited, outside in zip(material.images, images, material.outside, strict=True)
    ]
    outside, psnr = (np.concatenate([getattr(one, name) for one in far]) for name in ("outside", "psnr"))
    counts = read.flipped, read.meant, read.reached, read.changed, read.compared
    return Outcomes(read.success, read.others, *counts, outside, psnr, norms, images)


def summary_row(found: Outcomes) -> dict[str, Any]:
    """Returns what a table says of one way to edit."""
    right, total = int(found.success.sum()), len(found.success)
    low, high = interval(right, total)
    compared = found.compared if found.compared.any() else np.ones(total, bool)
    return {
        "edits": total,
        "success": right / total,
        "95% from": low,
        "to": high,
        "compared": int(found.compared.sum()),
        "others changed": float(found.others[compared].mean()),
        "flipped": float(found.flipped[compared].mean()),
        **precision_recall(found.meant, found.reached, found.changed),
        "outside": float(found.outside.mean()),
        "psnr outside": float(found.psnr.mean()),
        "norm": float(found.norm.mean()),
    }


def paired_difference(
    first: Float[np.ndarray, "case"] | Bool[np.ndarray, "case"],
    second: Float[np.ndarray, "case"] | Bool[np.ndarray, "case"],
) -> dict[str, float]:
    """Returns the mean difference of two measures of the same cases, with its 95% interval (percentile bootstrap).

    Args:
        first: of one way to edit.
        second: of the other, which is subtracted.
    """
    difference = first.astype(np.float64) - second.astype(np.float64)
    if np.ptp(difference) == 0:
        low = high = float(difference[0])
    else:
        found = stats.bootstrap(
            (difference,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"difference": float(difference.mean()), "95% from": low, "to": high}


def mean_with_interval(values: Float[np.ndarray, "case"] | Bool[np.ndarray, "case"]) -> tuple[float, float, float]:
    """Returns the mean of a measure and the ends of its 95% interval (percentile bootstrap).

    Args:
        values: one per case.
    """
    mean, low, high = paired_difference(values, np.zeros(len(values))).values()
    return mean, low, high
