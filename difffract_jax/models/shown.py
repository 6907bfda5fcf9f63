"""What a pipeline shows of itself."""

from typing import Any

from difffract_jax.display import hash_text
from difffract_jax.graphs.loras import texts_of
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.qwen3 import Qwen3Config
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.trees import tree_text


def pipeline_facts(pipe: Any) -> tuple[str, dict[str, str]]:
    """Returns a title and facts of a pipeline, for `display`.

    Args:
        pipe: a `Pipeline`, whose module imports this one.
    """
    shape, run = pipe.config.transformer, pipe.config.defaults
    depths = shape.layout.flux_depths
    blocks = " and ".join(f"{stack.depth} {stack.name}" for stack in shape.layout.stacks) + " blocks"
    if isinstance(shape, Sd3Config):
        blocks = f"{shape.depth_double} blocks, {shape.depth_dual} of them with two attentions"
    elif depths is not None:
        blocks = f"{depths[0]} double- and {depths[1]} single-stream blocks"
    labels = ("Qwen3" if isinstance(pipe.config.t5, Qwen3Config) else "T5") + " encoder", "CLIP encoder"
    labels = labels if shape.pooled_width else (labels[0], "pooled text")
    if isinstance(pipe.config.t5, AbsentConfig | None):  # of a model of one's own, or without encoders
        labels = "text encoder", "pooled text"
    title = shape.title or (None if depths is None else "FLUX")
    return "Pipeline" if title is None else f"{title} pipeline", {
        "transformer": f"{blocks}, width {shape.d_model}, {shape.heads} heads; {tree_text(pipe.transformer)}",
        **{label: tree_text(part) for label, part in zip(labels, (pipe.t5, pipe.clip), strict=True)},
        "autoencoder": tree_text(pipe.vae),
        "by default": f"{run.height} x {run.width} pixels, {run.steps} steps, {run.text_tokens} text tokens",
        "source": hash_text(pipe.source),
        **({"from": pipe.origin} if pipe.origin else {}),
        **({"LoRA": texts_of(pipe.loras)} if pipe.loras else {}),
    }
