"""Taking features away, and what becomes of the object they act on; shared by steps, concept-context and suppressor.

1. `draw_plain` draws cases in which nothing shall change: a right image of two shapes, one object of it meant.
2. `colour_effects` gives the total effect (`effects.total_effects`) of every place on a colour of the object's box.
3. A `Removal` holds, for each case, the places, the tokens where they are edited, and a strength: codes are
   multiplied by 1 - strength.
4. `run_removals` applies all of them in one compiled call, and `look`s: the object is found again as the nearest one
   within `SAME_PLACE` pixels. `matched` scales removals to the norms of others, by one run that measures their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, UInt8

from difffract_jax.circuits.attribution.engine import Output
from difffract_jax.circuits.attribution.outputs import GREY, PixelTarget, parse_target, resolve_target
from difffract_jax.circuits.editing.sweeps import AT_ONCE, steer_batch
from difffract_jax.circuits.effects.effect_tables import counted_rows, summed
from difffract_jax.circuits.effects.total_effects import TotalEffects, total_effects
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask
from difffract_jax.circuits.trace.capture import Span, capture_steps
from difffract_jax.config import UserError
from difffract_jax.generators import random_generator
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import COLOUR_NAMES, CONCEPTS, parse
from difffract_jax.organism.evaluate import held_out, see
from difffract_jax.organism.scorer import SeenScenes
from difffract_jax.organism.world import from_caption
from difffract_jax.studies.cases import Case, Material, draw_cases
from difffract_jax.studies.choices import SIDES, FeaturePlaces, first, removals
from difffract_jax.studies.evaluations import plain_run, refuse_branches
from difffract_jax.studies.metrics import SAME_PLACE, distances
from difffract_jax.studies.outcomes import mean_with_interval
from difffract_jax.transcoders.transcoder import TranscoderSet

NOTHING = -2
"""Colour of an object that is not there any more."""
Progress = Callable[[int, int], None]


def draw_plain(world: int, count: int, first_seed: int) -> list[Case]:
    """Draws held-out scenes of two shapes that shall show what they say; the object meant takes turns.

    Args:
        world: seed of the scenes.
        count: how many.
        first_seed: noise seed of the first; the others count on.
    """
    captions = held_out(count, "two shapes", world).captions
    return [Case(prompt, prompt, first_seed + row, row % 2) for row, prompt in enumerate(captions)]


def right_images(pipe: Pipeline, cases: Sequence[Case], progress: Progress | None = None) -> Material:
    """Samples the images of cases and keeps those that are right.

    Args:
        pipe: the organism.
        cases: the cases.
        progress: called with (images done, images in all).

    Raises:
        UserError: if none is.
    """
    material = draw_cases(pipe, cases, progress)
    if not material.cases:
        raise UserError(
            f"None of {len(cases)} images shows what its caption says, so that there is nothing to study; draw more "
            "cases with a larger size, or give a model that follows its captions."
        )
    return material


def drawn_colour(case: Case) -> str:
    """Returns the colour in which the object that a case means is drawn: a concept's own, else the one named."""
    thing = parse(case.prompt).objects[case.slot]
    return CONCEPTS.get(thing.noun, thing.colour)


def explained(
    pipe: Pipeline, tcs: TranscoderSet, prompt: str, seed: int, targets: Sequence[str], *, last: int | None = None
) -> tuple[Span, list[Output]]:
    """Records all steps of a run, and resolves outputs of its last step.

    Args:
        pipe: the pipeline.
        tcs: its transcoders.
        prompt: of the run.
        seed: of its starting noise.
        targets: as text, see `outputs`; no features.
        last: their step; the run's last if left out.
    """
    end = pipe.plan().steps - 1 if last is None else last
    span = capture_steps(pipe, tcs, prompt, last=end, seed=seed)
    parsed = [parse_target(target) for target in targets]
    return span, [resolve_target(pipe, span, target) for target in parsed if not isinstance(target, Feature)]


def effects_on(
    pipe: Pipeline, tcs: TranscoderSet, prompt: str, seed: int, targets: Sequence[str], *, last: int | None = None
) -> list[TotalEffects]:
    """Returns what every source of a run, over all steps, adds to some outputs of its last step.

    Args:
        pipe: this and the rest as in `explained`.
        tcs: transcoders.
        prompt: of the run.
        seed: of its noise.
        targets: the outputs.
        last: their step; the run's last if left out.

    Raises:
        UserError: if the pipeline's guidance makes two evaluations a step.
    """
    plain_run(pipe)
    span, outputs = explained(pipe, tcs, prompt, seed, targets, last=last)
    return [total_effects(span, tcs, output) for output in outputs]


def place_effects(
    found: TotalEffects,
    tcs: TranscoderSet,
    inside: Bool[np.ndarray, "img"],
    phrase: Bool[np.ndarray, "txt"],
    steps: int | None = None,
) -> Float64[np.ndarray, "place"]:
    """Sums total effects over the tokens that count, in the order of `choices.all_places`.

    Args:
        found: total effects of a run, from its first step on.
        tcs: its transcoders.
        inside: image tokens that count.
        phrase: text tokens that count.
        steps: of the places; as many as were run if left out. Later ones have no effect.

    Raises:
        UserError: if the run has two evaluations a step.
    """
    refuse_branches(found.branches)
    columns, layout = [], found.layout
    slots = tcs.sites.slots(layout)
    for kind, side in SIDES:
        sites = []  # of one name, in one stack or several, as the image's in Stable Diffusion 3
        for number, group in enumerate(layout.groups):
            layers = [block - layout.blocks_of(number).start for block in slots[number]]
            if group.name == kind.name and layers:
                counted = counted_rows(layout, number, side, inside, phrase)
                sites.append(summed(found, number, layers, counted, tcs.config.features))
        if sites:
            total = np.concatenate(sites, axis=1)
            columns.append(np.pad(total, ((0, (steps or len(total)) - len(total)), (0, 0), (0, 0))).ravel())
    return np.concatenate(columns)


class Removal(NamedTuple):
    """Features to take away, one entry per case.

    Attributes:
        chosen: places to edit.
        strength: codes are multiplied by 1 - strength.
        inside: image tokens edited.
        phrase: text tokens edited.
    """

    chosen: tuple[Int[np.ndarray, "_"], ...]
    strength: Float[np.ndarray, "case"]
    inside: Bool[np.ndarray, "case img"]
    phrase: Bool[np.ndarray, "case txt"]

    def at(self, strength: float) -> "Removal":
        """Returns the removal at another strength."""
        return self._replace(strength=np.full(len(self.chosen), strength))

    def edits(self, places: FeaturePlaces) -> list[list[Edit]]:
        """Returns the edits of every case."""
        columns = zip(self.chosen, self.strength, self.inside, self.phrase, strict=True)
        return [removals(places, chosen, float(strength), image, text) for chosen, strength, image, text in columns]


class Looks(NamedTuple):
    """What edited images show, one entry per case.

    Attributes:
        colour: index of the colour that the object reads in; -1 unreadable, `NOTHING` if none is there.
        noun: whether the object still reads as its noun.
        others: whether every other object still has noun and colour at its place.
        outside: change of the pixels that are surely not the object's, RMS, in pixels of [0, 1].
        norm: size of the edits.
        images: edited.
    """

    colour: Int[np.ndarray, "case"]
    noun: Bool[np.ndarray, "case"]
    others: Bool[np.ndarray, "case"]
    outside: Float[np.ndarray, "case"]
    norm: Float[np.ndarray, "case"]
    images: UInt8[np.ndarray, "case H W rgb"]

    def has(self, colours: Sequence[str]) -> Bool[np.ndarray, "case"]:
        """Returns whether the object reads in a colour, one per case."""
        return self.colour == [COLOUR_NAMES.index(name) for name in colours]


Removals = Mapping[tuple[Any, ...], Removal]


def run_removals(
    pipe: Pipeline,
    tcs: TranscoderSet,
    material: Material,
    places: FeaturePlaces,
    removals: Removals,
    progress: Progress | None = None,
) -> dict[tuple[Any, ...], Looks]:
    """Applies every removal to every case, and reads the images.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        material: the cases.
        places: of the transcoders.
        removals: by name.
        progress: called with (images done, images in all).
    """
    many, cases = len(removals), material.cases
    edits = [edits for removal in removals.values() for edits in removal.edits(places)]
    prompts, seeds = [case.prompt for case in cases] * many, [case.seed for case in cases] * many
    made = steer_batch(pipe, tcs, prompts, edits, seeds, batch=AT_ONCE, progress=progress)
    shape = many, len(cases)
    images, norms = made.images.reshape(*shape, *made.images.shape[1:]), made.norms.reshape(shape)
    return {name: look(material, images[row], norms[row]) for row, name in enumerate(removals)}


def matched(
    pipe: Pipeline,
    tcs: TranscoderSet,
    material: Material,
    places: FeaturePlaces,
    removals: Removals,
    norms: Mapping[tuple[Any, ...], Float[np.ndarray, "case"]],
    progress: Progress | None = None,
) -> dict[tuple[Any, ...], Removal]:
    """Scales removals to given norms, case by case, after a run at strength 1 that measures their own.

    Norms grow with the strength, exactly so where edits do not act on one another. A removal without places keeps 1.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        material: the cases.
        places: of the transcoders.
        removals: by name; they are measured at strength 1.
        norms: name of a removal, and anything after it -> the norms wanted.
        progress: called with (images done, images in all).

    Returns:
        The names of `norms` -> scaled removals.
    """
    ones = {name: removal.at(1.0) for name, removal in removals.items()}
    own = {name: looks.norm for name, looks in run_removals(pipe, tcs, material, places, ones, progress).items()}
    scaled = {}
    for name, wanted in norms.items():
        (short,) = (key for key in removals if name[: len(key)] == key)
        scale = np.divide(wanted, own[short], out=np.ones(len(wanted)), where=own[short] > 0)
        scaled[name] = removals[short]._replace(strength=scale)
    return scaled


def look(material: Material, images: UInt8[np.ndarray, "case H W rgb"], norms: Float[np.ndarray, "case"]) -> Looks:
    """Reads edited images of all cases, each beside its original.

    Args:
        material: the cases; their unedited images are right.
        images: edited.
        norms: size of each one's edits.
    """
    before, after = see(material.images), see(images)
    size = len(images)
    colour, noun, others = np.full(size, NOTHING), np.zeros(size, bool), np.ones(size, bool)
    for row, case in enumerate(material.cases):
        asked = from_caption(case.prompt)
        meant = asked.kind[0, case.slot], asked.colour[0, case.slot]
        for old in range(before.count[row]):
            pair = before.kind[row, old], before.colour[row, old]
            there = _nearest(after, row, before.centre[row, old])
            seen = (NOTHING, NOTHING) if there is None else (after.kind[row, there], after.colour[row, there])
            if pair == meant:
                colour[row], noun[row] = seen[1], seen[0] == pair[0]
            else:
                others[row] &= seen == pair
    far = zip(material.images, images, material.outside, strict=True)
    outside = [float(distances(a[None], b[None], ~rest).outside[0]) for a, b, rest in far]
    return Looks(colour, noun, others, np.array(outside), norms, images)


def _nearest(seen: SeenScenes, row: int, centre: np.ndarray) -> int | None:
    """Returns which object that was read lies nearest, if it is near enough to be the same."""
    away = np.linalg.norm(seen.centre[row, : seen.count[row]] - centre, axis=1)
    return int(away.argmin()) if away.size and away.min() <= SAME_PLACE else None


def colour_values(
    material: Material, images: UInt8[np.ndarray, "case H W rgb"], colours: Sequence[str]
) -> Float64[np.ndarray, "case"]:
    """Returns the mean over each object's box of rgb - grey along a colour less grey: `outputs.colour_of` of pixels.

    Args:
        material: the cases.
        images: of them.
        colours: one per case.
    """
    found = []
    for row, (image, name) in enumerate(zip(images, colours, strict=True)):
        mask = box_mask(material.box(row), image.shape[:2])
        target = parse_target(f"pixels:color={name}")
        assert isinstance(target, PixelTarget)
        along = np.subtract(target.colour, GREY)
        found.append((image[mask] / 255 - GREY).mean(axis=0) @ (along / np.linalg.norm(along)))
    return np.array(found)


def random_places(
    codes: Float[np.ndarray, "case place"],
    like: Sequence[Int[np.ndarray, "_"]],
    seed: int,
    allowed: Bool[np.ndarray, "place"] | None = None,
) -> tuple[Int[np.ndarray, "_"], ...]:
    """Returns active places at random, case by case as many as in another choice.

    Args:
        codes: of every place.
        like: the other choice.
        seed: of this one.
        allowed: places to choose among; all if left out.
    """
    found = []
    for row, (code, mine) in enumerate(zip(codes, like, strict=True)):
        score = random_generator(seed, row).uniform(0.0, 1.0, code.size)
        found.append(first(np.where((code > 0) & (True if allowed is None else allowed), score, 0.0), len(mine)))
    return tuple(found)


def counted(one: Looks, colours: Sequence[str], fall: Float64[np.ndarray, "case"]) -> dict[str, Any]:
    """Returns what a table says of one removal.

    Args:
        one: what its images show.
        colours: of the objects before, one per case.
        fall: by how much each colour's value fell.

    Returns:
        Shares of cases in which the object has lost its colour, and of these with its noun and all others right; in
        which it keeps its noun, in which all others are right; change elsewhere, fall with its interval, norm.
    """
    gone = ~one.has(colours)
    clean = float((one.noun & one.others)[gone].mean()) if gone.any() else 0.0
    row = {"colour gone": float(gone.mean()), "of these all else right": clean, "noun": float(one.noun.mean())}
    row |= {"others right": float(one.others.mean()), "elsewhere": float(one.outside.mean())}
    mean, low, high = mean_with_interval(fall)
    return row | {"fall": mean, "95% from": low, "to": high, "norm": float(one.norm.mean())}
