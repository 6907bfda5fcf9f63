"""The organism's recipe: every number that its training depends on."""

from pydantic import Field

from difffract_jax.config import Seed, Settings


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
    depth_single: int = Field(2, ge=1)
    """Single-stream blocks."""
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
