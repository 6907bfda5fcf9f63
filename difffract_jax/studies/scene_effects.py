"""What features add to an exchange of colours, scene by scene, with attention frozen and explained.

1. The run of a scene's caption and that of the exchanged one are recorded, over all steps.
2. Of either object's target, the other's colour minus its own in its box at the last step, the total effects of all
   features are found in both runs.
3. Moving a code from one run to the other adds to a target what both runs tell (`choices.by_circuit`). Kept are, per
   place of either object, that of the mean code on the object's own target, and that of every token's own code, summed
   over the tokens, on both targets.

What is kept of a scene can lie in a file, so that a run that was broken off goes on where it was.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from difffract_jax.circuits.effects.total_effects import TotalEffects, prepare_effects, total_effects
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.storage.files import atomic_file
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Material
from difffract_jax.studies.code_moves import Codes, Tokens, marked_rows, place_codes
from difffract_jax.studies.precision import colour_target
from difffract_jax.studies.removing import explained, place_effects
from difffract_jax.transcoders.transcoder import TranscoderSet

ATTENTION = ("frozen", "explained")


class SceneScores(NamedTuple):
    """What moving a place from one run's code to the other's adds to the exchange, as circuits tell.

    Attributes:
        mean: its mean code, on the object's own target; by `ATTENTION`.
        token: every token's own code, on both objects' targets; alike.
    """

    mean: Float[np.ndarray, "attention object place"]
    token: Float[np.ndarray, "attention object place"]


def scene_scores(
    pipe: Pipeline,
    tcs: TranscoderSet,
    both: tuple[Material, Material],
    row: int,
    codes: tuple[Codes, Codes],
    kept: Path | None = None,
) -> SceneScores:
    """Scores the places of both objects of a scene.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        both: the scenes, once for either object.
        row: which scene.
        codes: all codes of its run, and of that of the exchanged caption.
        kept: folder in which scores are kept, and looked for; none if left out. A file there that cannot be read is a
            `UserError`.
    """
    case = both[0].cases[row]
    name = f"{pipe.source[:12]}-{tcs.source[:12]}-{case.seed}.npz"
    if kept is not None and (kept / name).is_file():
        prompt, scores = _read_scores(kept / name)
        if prompt == case.prompt:
            return scores
    scores = _scores(pipe, tcs, both, row, codes)
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept / name) as partial, partial.open("wb") as file:
            np.savez(file, prompt=case.prompt, mean=scores.mean, token=scores.token)
    return scores


def _read_scores(path: Path) -> tuple[str, SceneScores]:
    """Returns the caption that a file is of, and the scores in it."""
    try:
        with path.open("rb") as stream, np.load(stream) as held:
            return str(held["prompt"]), SceneScores(held["mean"], held["token"])
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}, which keeps what circuits tell of a scene, is damaged; delete it, and that scene is scored again."
        ) from None


def _scores(
    pipe: Pipeline, tcs: TranscoderSet, both: tuple[Material, Material], row: int, codes: tuple[Codes, Codes]
) -> SceneScores:
    case = both[0].cases[row]
    targets = [colour_target(case.prompt, case.wanted, slot, one.box(row)) for slot, one in enumerate(both)]
    tokens: list[Tokens] = [(one.inside[row], one.phrase[row]) for one in both]
    found: list[list[list[TotalEffects]]] = [[], []]  # by attention, run and object
    for prompt in (case.prompt, case.wanted):
        span, outputs = explained(pipe, tcs, prompt, case.seed, targets)
        ready = prepare_effects(span, tcs)
        found[0].append([total_effects(ready, tcs, output) for output in outputs])
        found[1].append([total_effects(ready, tcs, output, attention="explained") for output in outputs])
    mean, token = [], []
    for runs in found:
        own = [[place_effects(run[slot], tcs, *tokens[slot]) for run in runs] for slot in (0, 1)]
        values = [[place_codes(one, where) for one in codes] for where in tokens]
        mean.append([choices.by_circuit(*values[slot], *own[slot]) for slot in (0, 1)])
        each = [sum(np.nan_to_num(_every_code(one)) for one in run) for run in runs]
        flat = [np.concatenate([array.ravel() for array in one]) for one in codes]
        moved = _split(choices.by_circuit(flat[0], flat[1], each[0], each[1]), codes[0])
        token.append([_at_places(moved, where) for where in tokens])
    return SceneScores(np.array(mean, np.float32), np.array(token, np.float32))


def _every_code(found: TotalEffects) -> Float[np.ndarray, "code"]:
    """Returns the effect of every code of a run, in the order of `Codes`, flattened."""
    parts = []
    for effects, index in zip(found.features, found.index, strict=True):
        effect, place = np.asarray(effects, np.float64), np.asarray(index)
        whole = np.zeros_like(effect)
        np.put_along_axis(whole, place, effect, axis=3)
        parts.append(whole.ravel())
    return np.concatenate(parts)


def _split(flat: Float[np.ndarray, "code"], like: Codes) -> Codes:
    """Undoes the flattening of `_every_code`."""
    ends = np.cumsum([array.size for array in like])[:-1]
    return tuple(part.reshape(array.shape) for part, array in zip(np.split(flat, ends), like, strict=True))


def _at_places(values: Codes, tokens: Tokens) -> Float[np.ndarray, "place"]:
    """Sums values of codes over the tokens that count, place by place."""
    return np.concatenate([values[number][:, :, rows].sum(axis=2).ravel() for number, rows in marked_rows(tokens)])


def tokens_of_both(both: tuple[Material, Material], row: int) -> Tokens:
    """Returns the tokens of either object of a scene.

    Args:
        both: the scenes, once for either object.
        row: which scene.
    """
    inside: Bool[np.ndarray, "img"] = both[0].inside[row] | both[1].inside[row]
    return inside, both[0].phrase[row] | both[1].phrase[row]
