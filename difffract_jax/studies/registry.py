"""Study by name. All take the organism, its transcoders, its SAEs, a size, and who shows progress."""

from typing import Protocol

from difffract_jax.models.pipeline import Pipeline
from difffract_jax.studies.binding import binding
from difffract_jax.studies.colour_prior import colour_prior
from difffract_jax.studies.errors import errors
from difffract_jax.studies.precision import precision
from difffract_jax.studies.repair import Advance
from difffract_jax.studies.results import Result
from difffract_jax.studies.settings import QUESTIONS
from difffract_jax.transcoders.transcoder import TranscoderSet


class Study(Protocol):
    """A study; see `precision.precision` for its arguments."""

    def __call__(
        self,
        pipe: Pipeline,
        tcs: TranscoderSet,
        saes: TranscoderSet,
        *,
        size: int | None,
        advance: Advance,
        **more: int,
    ) -> Result:
        """Runs it."""
        ...


STUDIES: dict[str, Study] = {
    "precision": precision,
    "colour-prior": colour_prior,
    "errors": errors,
    "binding": binding,
}
assert STUDIES.keys() == QUESTIONS.keys()
