"""The organism's recipe: every number that its training depends on."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from difffract_jax.config import Seed, Settings

Arch = Literal["flux", "sd3", "flux2"]
"""Whose architecture the transformer has: FLUX.1's, Stable Diffusion 3.5's or FLUX.2's."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "flux": {},
    "sd3": {"begin": "organism", "flow": {"depth_double": 4, "depth_single": 0, "dropped": 0.1}},
    "flux2": {"begin": "organism"},
}
"""Architecture -> what its recipe has where nothing else is given, and the organism's has not."""


class ImageRecipe(Settings):
    """Training of the autoencoder."""

    steps: int = Field(2400, ge=1)
    """Steps."""
    batch: int = Field(8, ge=4)
    """Images in a step."""
    learning_rate: float = Field(4e-3, gt=0)
    """Highest learning rate."""
    warm_up: int = Field(50, ge=0)
    """Steps in which it is reached."""
    kl: float = Field(1e-4, ge=0)
    """Weight of the divergence of latents from a standard normal."""


class TextRecipe(Settings):
    """Pretraining of the text encoders."""

    steps: int = Field(2500, ge=1)
    """Steps."""
    batch: int = Field(64, ge=2)
    """Prompts in a step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Highest learning rate."""


class FlowRecipe(Settings):
    """Shape and training of the transformer."""

    depth_double: int = Field(2, ge=1)
    """Double-stream blocks."""
    depth_single: int = Field(2, ge=0)
    """Single-stream blocks; Stable Diffusion 3 has none."""
    heads: int = Field(2, ge=1)
    """Attention heads of width 32."""
    steps: int = Field(30000, ge=10)
    """Steps."""
    batch: int = Field(32, ge=1)
    """Scenes in a step."""
    pool: int = Field(40960, ge=1)
    """Scenes that are drawn and encoded beforehand."""
    learning_rate: float = Field(1.5e-2, gt=0)
    """Muon's learning rate in the flat part."""
    adam: float = Field(0.25, gt=0)
    """Adam's learning rate, relative to Muon's."""
    warm_up: int = Field(100, ge=1)
    """Steps in which it is reached."""
    flat_share: float = Field(0.3, gt=0, lt=1)
    """Share of the steps before it falls."""
    uniform_share: float = Field(0.7, ge=0, le=1)
    """Share of times drawn uniformly; the rest are schnell's four."""
    average: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average."""
    dropped: float = Field(0.0, ge=0, lt=1)
    """Share of scenes whose caption is taken away, so that guidance by two branches has a second one."""


class OrganismRecipe(Settings):
    """Everything that `difffract organism train` needs."""

    seed: Seed = 0
    """Seed of weights, scenes and noise."""
    # Type checkers take `Field(2400, ...)` for a field without default, hence no plain `TextRecipe()`.
    text: TextRecipe = TextRecipe.model_validate({})
    """The text encoders."""
    images: ImageRecipe = ImageRecipe.model_validate({})
    """The autoencoder."""
    flow: FlowRecipe = FlowRecipe.model_validate({})
    """The transformer."""
    save_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    arch: Arch = "flux"
    """Whose architecture the transformer has, and with it the text encoders."""
    begin: str = ""
    """Pipeline whose autoencoder, T5 and CLIP are taken as they are, where the architecture has them; all parts are
    trained where this is empty."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_architecture(cls, values: Any) -> Any:
        """Fills in what an architecture has of its own."""
        own = OWN.get(values.get("arch", "flux")) if isinstance(values, Mapping) else None
        if not own:
            return values
        flow = values.get("flow", {})
        filled = {"flow": {**own.get("flow", {}), **flow}} if isinstance(flow, Mapping) else {}
        return {**own, **values, **filled}

    @model_validator(mode="after")
    def _has_the_stacks(self) -> "OrganismRecipe":
        """Refuses blocks that an architecture has not, or too few of those that it has."""
        flow = self.flow
        if self.arch == "sd3" and (flow.depth_single or flow.depth_double < 2):
            raise ValueError(
                f"flow.depth_double={flow.depth_double} and flow.depth_single={flow.depth_single}: Stable Diffusion 3 "
                "has no single-stream blocks, and at least 2 double-stream ones, of which the last is of its own kind"
            )
        if self.arch != "sd3" and not flow.depth_single:
            raise ValueError("flow.depth_single=0: FLUX has at least 1 single-stream block")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_the_organisms(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out what the organism's recipe has not, so that its files stay what they were."""
        values = dump(self)
        for part, name, default in ADDED:
            home = values[part] if part else values
            if home.get(name) == default:
                del home[name]
        return values


ADDED: tuple[tuple[str, str, Any], ...] = (("", "arch", "flux"), ("", "begin", ""), ("flow", "dropped", 0.0))
"""Part, name and the organism's value of what a file of the organism's recipe does not have."""


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a recipe's file with those that it leaves out."""
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for part, name, value in ADDED:
        (made.setdefault(part, {}) if part else made).setdefault(name, value)
    return made
