"""What a pipeline shows of itself."""

from typing import Any

from difffract_jax.display import hash_text
from difffract_jax.graphs.loras import texts_of
from difffract_jax.trees import tree_text


def pipeline_facts(pipe: Any) -> tuple[str, dict[str, str]]:
    """Returns a title and facts of a pipeline, for `display`.

    Args:
        pipe: a `Pipeline`, whose module imports this one.
    """
    shape, run = pipe.config.transformer, pipe.config.defaults
    blocks = f"{shape.depth_double} double- and {shape.depth_single} single-stream blocks"
    return "FLUX pipeline", {
        "transformer": f"{blocks}, width {shape.d_model}, {shape.heads} heads; {tree_text(pipe.transformer)}",
        "T5 encoder": tree_text(pipe.t5),
        "CLIP encoder": tree_text(pipe.clip),
        "autoencoder": tree_text(pipe.vae),
        "by default": f"{run.height} x {run.width} pixels, {run.steps} steps, {run.text_tokens} text tokens",
        "source": hash_text(pipe.source),
        **({"from": pipe.origin} if pipe.origin else {}),
        **({"LoRA": texts_of(pipe.loras)} if pipe.loras else {}),
    }
