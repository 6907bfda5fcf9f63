"""PyTorch's transformer and text encoder of Z-Image for `convert check`, run in float32."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from converters.pipeline_kind import ModelCheck
from converters.torch_files import BlockRecord, TransformerInputs, TransformerRecord, load_blockwise, load_module
from converters.torch_text import record_states
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import pack, unpack
from difffract_jax.models.tokenizers import TokenIds
from difffract_jax.models.zimage_text import ZImageQwen3Config, filled_text

LARGE = 1000.0
"""Factor of states that were divided by their root mean square, so that PyTorch's norm of them changes nothing."""


def record_zimage(directory: Path, inputs: TransformerInputs) -> TransformerRecord:
    """Runs the transformer once and returns what went into and came out of every block.

    Args:
        directory: of the pipeline.
        inputs: of the call; rows of the text whose last channel is 1 are learned tokens, and rows of zeros are hidden.

    Returns:
        What the blocks did; what text tokens that are hidden become is zeros.
    """
    torch, diffusers = load_module("torch"), load_module("diffusers")
    path, kind = directory / "transformer", diffusers.ZImageTransformer2DModel
    model = load_blockwise(torch, lambda: kind.from_config(kind.load_config(path)), path)
    seen: dict[int, tuple[np.ndarray, ...]] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen[id(module)] = tuple(one[0].numpy().copy() for one in (args[0], output, *args[3:4]))

    refiners, others = [*model.noise_refiner, *model.context_refiner], [*model.layers]
    for module in (*refiners, *others):
        module.register_forward_hook(keep)
    own = np.any(inputs.text[:, :-1] != 0, axis=-1)
    latent = np.asarray(unpack(jnp.asarray(inputs.latents), inputs.grid)).transpose(2, 0, 1)[:, None]
    with torch.no_grad():
        made = model(
            [torch.from_numpy(latent.copy())],
            torch.tensor([1 - inputs.t]),
            [torch.from_numpy(LARGE * inputs.text[own, :-1])],
        ).sample[0]
    blocks = _refined(inputs, [seen[id(one)] for one in refiners], len(model.noise_refiner))
    pixels = len(inputs.latents)
    for one in others:
        before, after, cond = seen[id(one)]
        streams = [part for rows in (before, after) for part in (rows[:pixels], _filled(rows[pixels:], inputs))]
        blocks.append(BlockRecord(streams[0], streams[1], cond, streams[2], streams[3]))
    velocity = -np.asarray(pack(made[:, 0].numpy().transpose(1, 2, 0)))
    return TransformerRecord(blocks, [], velocity)


def _refined(inputs: TransformerInputs, refiners: list[tuple[np.ndarray, ...]], images: int) -> list[BlockRecord]:
    """Returns the records of the refiners, of the image before those of the text; each leaves the other stream."""
    cond, entering = refiners[0][2], _filled(refiners[images][0], inputs)
    blocks = [BlockRecord(one[0], entering, cond, one[1], entering) for one in refiners[:images]]
    for before, after, *_ in refiners[images:]:
        image = blocks[-1].img_out
        blocks.append(BlockRecord(image, _filled(before, inputs), cond, image, _filled(after, inputs)))
    return blocks


def _filled(rows: np.ndarray, inputs: TransformerInputs) -> Float32[np.ndarray, "txt d_model"]:
    return np.pad(rows, ((0, len(inputs.text) - len(rows)), (0, 0)))


def _text(directory: Path, ids: TokenIds, config: PipelineConfig) -> Float32[np.ndarray, "txt states"]:
    """Returns the text of PyTorch's states."""
    shape = config.t5
    assert isinstance(shape, ZImageQwen3Config)
    states = record_states(directory, ids.t5_ids, ids.t5_mask, shape.read_layers)
    return np.asarray(filled_text(jnp.asarray(states), jnp.asarray(ids.t5_ids) != shape.padding_id))


CHECK = ModelCheck(
    encoder="qwen3",
    tolerances=10,  # 35 layers, whose errors add up
    text=_text,
    record=record_zimage,
    conditions=lambda cond, record: (cond.vec, record.blocks[0].cond),
    given=lambda cond, record, block: cond._replace(vec=jnp.asarray(block.cond)),
)
"""How Z-Image is compared with PyTorch's."""
