"""Study by name: what each takes of what a user gives."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from difffract_jax.circuits.notation.labels import Labels
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.studies.attention_binding import attention_binding
from difffract_jax.studies.binding import binding
from difffract_jax.studies.colour_prior import colour_prior
from difffract_jax.studies.concept_context import concept_context
from difffract_jax.studies.errors import errors
from difffract_jax.studies.flow import flow
from difffract_jax.studies.precision import ROUNDS, precision
from difffract_jax.studies.results import Advance, Result
from difffract_jax.studies.settings import QUESTIONS
from difffract_jax.studies.steps import steps
from difffract_jax.studies.suppressor import suppressor
from difffract_jax.transcoders.transcoder import TranscoderSet


class Given(NamedTuple):
    """What a study is run on.

    Attributes:
        pipe: the pipeline.
        tcs: its transcoders.
        saes: its SAEs, for comparison; None where the study has no use for them.
        labels: of the transcoders' features; None if there are none.
        size: cases instead of the registered number; None for that.
        round: of `precision` or `binding` with attention explained; None for the last.
        prompts: for `flow`, on any pipeline; None for the organism's scenes.
        attention: of `binding`: `frozen` or `explained`.
        kept: folder for what a run that is broken off can go on from; None for none.
    """

    pipe: Pipeline
    tcs: TranscoderSet
    saes: TranscoderSet | None
    labels: Labels | None
    size: int | None
    round: int | None
    prompts: tuple[str, ...] | None
    attention: str = "frozen"
    kept: Path | None = None


def _binding(given: Given, advance: Advance) -> Result:
    if given.attention == "frozen":
        return binding(given.pipe, given.tcs, size=given.size, advance=advance)
    return attention_binding(
        given.pipe, given.tcs, size=given.size, round=given.round, advance=advance, kept=given.kept
    )


def _precision(given: Given, advance: Advance) -> Result:
    assert given.saes is not None
    rules = given.round or max(ROUNDS)
    return precision(given.pipe, given.tcs, given.saes, size=given.size, advance=advance, round=rules)


STUDIES: dict[str, Callable[[Given, Advance], Result]] = {
    "precision": _precision,
    "colour-prior": lambda given, advance: colour_prior(given.pipe, given.tcs, size=given.size, advance=advance),
    "errors": lambda given, advance: errors(given.pipe, given.tcs, size=given.size, advance=advance),
    "binding": _binding,
    "flow": lambda given, advance: flow(given.pipe, given.tcs, prompts=given.prompts, size=given.size, advance=advance),
    "steps": lambda given, advance: steps(given.pipe, given.tcs, size=given.size, advance=advance),
    "concept-context": lambda given, advance: concept_context(given.pipe, given.tcs, size=given.size, advance=advance),
    "suppressor": lambda given, advance: suppressor(
        given.pipe, given.tcs, labels=given.labels, size=given.size, advance=advance
    ),
}
assert STUDIES.keys() == QUESTIONS.keys()
