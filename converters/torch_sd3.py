"""PyTorch's transformer of Stable Diffusion 3 for `convert check`, run in float32.

It takes and gives latents that are not packed, and a time of 0 to 1000.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.torch_files import TransformerInputs, TransformerRecord, load_blockwise, load_module, record_blocks
from difffract_jax.models.sampler import pack, unpack

TIMES = 1000
"""Steps of training, in which the transformer is told the time."""


def record_sd3(directory: Path, inputs: TransformerInputs) -> TransformerRecord:
    """Runs the transformer once and returns what went into and came out of every block.

    Args:
        directory: of the pipeline.
        inputs: of the call; the model takes no guidance scale.
    """
    torch, diffusers = load_module("torch"), load_module("diffusers")
    path, kind = directory / "transformer", diffusers.SD3Transformer2DModel
    model = load_blockwise(torch, lambda: kind.from_config(kind.load_config(path)), path)
    latent = np.asarray(unpack(jnp.asarray(inputs.latents), inputs.grid)).transpose(2, 0, 1)
    given = {
        "hidden_states": torch.from_numpy(latent[None].copy()),
        "encoder_hidden_states": torch.from_numpy(inputs.text[None].copy()),
        "pooled_projections": torch.from_numpy(inputs.pooled[None].copy()),
        "timestep": torch.tensor([TIMES * inputs.t]),
    }
    blocks, made = record_blocks(torch, model, list(model.transformer_blocks), given, len(inputs.text))
    velocity = np.asarray(pack(made[0].permute(1, 2, 0).numpy()))
    return TransformerRecord(blocks, [], velocity)
