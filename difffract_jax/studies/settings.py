"""The studies that there are, and the settings of `difffract study`."""

from pathlib import Path

from pydantic import Field

from difffract_jax.config import Settings

QUESTIONS = {
    "precision": "are edits that a circuit chooses more precise than those chosen with an SAE?",
    "colour-prior": "a blue lemon is drawn yellow; what undoes it?",
    "errors": "where the wrong noun is drawn, which features cause it, and does taking them away repair the image?",
    "binding": "which features carry red to the circle and not to the square; exchanged, do the colours change places?",
}
"""Study -> its question."""


class StudyConfig(Settings):
    """Settings of `difffract study`."""

    name: str
    """Which study, see below."""
    size: int | None = Field(None, ge=2)
    """Cases of the test instead of the registered number, to try a study out; results of fewer are no result."""
    round: int | None = Field(None, ge=1, le=2)
    """Which registered round of `precision`; the last when left out."""
    transcoders: str = "organism"
    """Transcoders of the organism's MLPs: `organism`, or a directory."""
    saes: str = "organism-saes"
    """SAEs of the same, for comparison: `organism-saes`, or a directory."""
    out: Path = Path("study")
    """Directory for NAME.md, NAME.json and the figures."""
