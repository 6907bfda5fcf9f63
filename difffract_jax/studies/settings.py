"""The studies that there are, and the settings of `difffract study`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from difffract_jax.config import LoraSettings

QUESTIONS = {
    "precision": "are edits that a circuit chooses more precise than those chosen with an SAE?",
    "colour-prior": "a blue lemon is drawn yellow; what undoes it?",
    "errors": "where the wrong noun is drawn, which features cause it, and does taking them away repair the image?",
    "binding": "which features carry red to the circle and not to the square; exchanged, do the colours change places?",
    "flow": "how much attribution crosses from text to image, in which layers and steps?",
    "steps": "in which step, and on which side of the sequence, is an object's colour decided?",
    "concept-context": "does an object hang on features at its own tokens, or as much on those around it?",
    "suppressor": "are there features that hold a competing colour down without carrying the object's own?",
}
"""Study -> its question."""
ON_SIBLINGS = ("flow", "precision")
"""Studies that run on the organism's siblings of other architectures too."""
ROUNDS = {"precision": 2, "binding": 2}
"""Study -> registered rounds; of `binding` those with attention explained."""


class StudyConfig(LoraSettings):
    """Settings of `difffract study`."""

    name: str
    """Which study, see below."""
    size: int | None = Field(None, ge=2)
    """Cases of the test instead of the registered number, to try a study out; results of fewer are not a result."""
    round: int | None = Field(None, ge=1, le=3)
    """Which registered round of `precision`, or of `binding` with attention explained; the last when left out."""
    attention: Literal["frozen", "explained"] = "frozen"
    """Whether the circuits of `binding` take attention as it was, or explain it: the registered rounds."""
    model: str = "organism"
    """Pipeline to study: `organism`; a sibling that `difffract organism train --arch` made, for `flow` and `precision`;
    another directory or hf:OWNER/NAME only for `flow`, with --prompts."""
    prompts: Path | None = None
    """Text file with a prompt per line, for `flow` on any pipeline; its target is then the velocity itself."""
    transcoders: str = "organism"
    """Transcoders of its MLPs: `organism`, a directory, or hf:OWNER/NAME[/FOLDER]."""
    saes: str = "organism-saes"
    """SAEs of the same, for comparison: `organism-saes`, a directory, or hf:OWNER/NAME[/FOLDER]."""
    out: Path = Path("study")
    """Directory for NAME.md, NAME.json and the figures; those that exist are replaced, with a note."""
